"""Entry point for Triton's Python backend: image tower."""

from serving.triton_models.tower import TowerModel


class TritonPythonModel(TowerModel):
    """Image tower; see `TowerModel`."""

    graph = "image"
