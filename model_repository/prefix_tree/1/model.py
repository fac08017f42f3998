"""Entry point for Triton's Python backend: text tower for prompts that share prefixes."""

from serving.triton_models.tower import TowerModel


class TritonPythonModel(TowerModel):
    """Text tower for prompts that share prefixes; see `TowerModel`."""

    graph = "prefix_tree"
