"""Entry point for Triton's Python backend; see `serving.triton_models.text_tokenize`."""

from serving.triton_models.text_tokenize import TextTokenize as TritonPythonModel

__all__ = ["TritonPythonModel"]
