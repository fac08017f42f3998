"""The Python models of a Triton model repository."""
