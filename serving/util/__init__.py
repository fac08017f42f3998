"""Helpers without knowledge of CLIP: files, directories, progress, typed JSON, the machine."""
