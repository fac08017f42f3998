"""Benchmarks of latency, load and accuracy; they use every runner through the same interface."""
