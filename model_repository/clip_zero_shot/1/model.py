"""Entry point for Triton's Python backend; see `serving.triton_models.zero_shot`."""

from serving.triton_models.zero_shot import ZeroShot as TritonPythonModel

__all__ = ["TritonPythonModel"]
