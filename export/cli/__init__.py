"""Command line of `export`, and the program `clip-deploy`, which adds the commands of `serving`."""
