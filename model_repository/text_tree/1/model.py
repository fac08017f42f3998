"""The text tower over trees, for label sets: texts that begin alike share what they begin with."""

from serving.triton_models.tower import TowerModel


class TritonPythonModel(TowerModel):
    """See `TowerModel`."""

    tower = "text"
    graph = "tree"
