"""Benchmarks of latency, load and accuracy; they use every runner through the same interface."""

import serving  # noqa: F401  turns off the telemetry of libraries before they are imported
