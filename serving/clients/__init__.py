"""Clients: the same calls to a Triton server and in this process."""
