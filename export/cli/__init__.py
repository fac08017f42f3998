"""The command line of `export`, and `clip-deploy`, which carries the commands of `serving` too."""
