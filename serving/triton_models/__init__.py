"""Implementations of the Python models in `model_repository/`."""
