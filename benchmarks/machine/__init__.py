"""Description, limits and timing of the machine."""
