"""Conversion of encoded images to pixels, and of strings to token ids."""
