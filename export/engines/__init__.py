"""TensorRT engines: building them from ONNX graphs, and adding them to a bundle."""
