"""Loaded by Triton's Python backend: the text tower."""

from serving.triton_models.tower import TowerModel


class TritonPythonModel(TowerModel):
    """See `TowerModel`."""

    graph = "text"
