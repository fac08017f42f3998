"""TensorRT engines: built from graphs, added to a bundle."""
