"""The text tower when the server has only the Python backend; other backends take a file."""

from serving.triton_models.tower import TowerModel


class TritonPythonModel(TowerModel):
    """See `TowerModel`."""

    tower = "text"
