"""Parity gate: data sets, verdicts, and the PyTorch reference runners."""
