"""Bundles: the manifest, the files it lists and their integrity, and facts of TensorRT engines."""
