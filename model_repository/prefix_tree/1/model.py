"""Loaded by Triton's Python backend: the text tower for prompts that share prefixes."""

from serving.triton_models.tower import TowerModel


class TritonPythonModel(TowerModel):
    """See `TowerModel`."""

    graph = "prefix_tree"
