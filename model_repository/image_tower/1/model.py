"""Loaded by Triton's Python backend: the image tower."""

from serving.triton_models.tower import TowerModel


class TritonPythonModel(TowerModel):
    """See `TowerModel`."""

    graph = "image"
