"""Report of what a machine can build and run, and of what is missing."""
