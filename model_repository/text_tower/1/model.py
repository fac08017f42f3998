"""The text tower when the server has only the Python backend; other backends take a file."""

from serving.tower_model import TowerModel


class TritonPythonModel(TowerModel):
    """See `TowerModel`."""

    tower = "text"
