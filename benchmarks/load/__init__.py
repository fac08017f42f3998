"""Load benchmark of a running Triton server."""
