"""Entry point for Triton's Python backend; see `serving.triton_models.image_preprocess`."""

from serving.triton_models.image_preprocess import LargeImagePreprocess as TritonPythonModel

__all__ = ["TritonPythonModel"]
