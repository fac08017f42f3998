"""The parity gate: datasets, verdicts, and the PyTorch runners it compares with."""
