"""Latency benchmark of every runner, based on pytest-benchmark."""
