"""Graphs of the towers: ONNX export, TorchScript export, and lint rules for ONNX graphs."""
