"""Command line: a thin layer on top of the other packages."""
