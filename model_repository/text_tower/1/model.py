"""Entry point for Triton's Python backend: text tower."""

from serving.triton_models.tower import TowerModel


class TritonPythonModel(TowerModel):
    """Text tower; see `TowerModel`."""

    graph = "text"
