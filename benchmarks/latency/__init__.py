"""Latency of every runner, by pytest-benchmark."""
