"""What this machine can build and run, and what is missing."""
