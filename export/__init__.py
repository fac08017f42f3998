"""Checkpoint -> bundle: the only package besides `training` that needs torch."""
