"""Graphs of the towers: ONNX export, TorchScript, lint."""
