"""Bundles: the manifest, its files and their integrity, facts of TensorRT engines."""
