"""Helpers that do not depend on CLIP: files, directories, progress, typed JSON, the machine."""
