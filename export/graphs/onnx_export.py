"""A tower -> one ONNX file with dynamic axes, checked.

Does not know: whether the graph computes the right thing (`parity.py`).
"""

import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

from export.towers.clip import ImageTower, TextTower
from export.towers.prefix_tree import PrefixTreeTower

OPSET = 20
"""LayerNormalization is one node from 17 on; every runtime we export for takes 20."""

PROTOBUF_LIMIT = 2_000_000_000
"""Bytes of weights above which they go to a file beside the graph; protobuf ends at 2 GiB."""


BOUNDARY = {
    ImageTower: ("pixels", "image_embeds"),
    TextTower: ("input_ids", "text_embeds"),
    PrefixTreeTower: ("trees", "text_embeds"),
}
"""Names of input and output of each kind of graph."""


def example_batch(tower: nn.Module) -> tuple[torch.Tensor, dict[int, torch.export.Dim]]:
    """A batch that the tower takes, and which of its axes are dynamic."""
    batch = torch.export.Dim("batch", min=1)
    if isinstance(tower, ImageTower):
        size = tower.config.image_size
        return torch.zeros(2, 3, size, size, dtype=torch.uint8), {0: batch}
    if isinstance(tower, TextTower):
        config = tower.config
        ids = torch.full((2, config.context_length), config.end_id, dtype=torch.int32)
        length = torch.export.Dim("length", min=2, max=config.context_length)
        return ids, {0: batch, 1: length}
    if isinstance(tower, PrefixTreeTower):
        trees = torch.full((2, 2, 9), tower.tower.config.end_id, dtype=torch.int32)
        return trees, {0: torch.export.Dim("rows", min=1), 2: torch.export.Dim("nodes", min=2)}
    raise TypeError(f"expected an ImageTower or a TextTower, got {type(tower).__name__}")


def export_onnx(tower: nn.Module, path: Path, metadata: dict[str, str]) -> list[Path]:
    """Write `tower` to `path`, and its weights to `<path>.data` when they are over 2 GB.

    The graph's boundary is that of `export.towers.clip` or `export.towers.prefix_tree`; `metadata`
    becomes its `metadata_props`.

    Returns:
        The files written, the graph first.
    """
    example, dynamic = example_batch(tower)
    given, made = BOUNDARY[type(tower)]
    # The exporter logs one line per torchvision operator that it could not register.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # its own deprecations; the result is checked below
        program = torch.onnx.export(
            tower.eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            input_names=[given],
            output_names=[made],
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    external = weights_bytes(tower) > PROTOBUF_LIMIT
    program.save(path, external_data=external)
    _tidy(path, metadata)
    onnx.checker.check_model(path, full_check=True)
    return [path, path.with_name(path.name + ".data")] if external else [path]


def weights_bytes(tower: nn.Module) -> int:
    """Size of a tower's weights."""
    return sum(t.numel() * t.element_size() for t in tower.state_dict().values())


def _tidy(path: Path, metadata: dict[str, str]) -> None:
    """Add metadata; drop stack traces (they name files of this machine) and stale shapes.

    ONNX Runtime's quantizer refuses the exporter's `value_info` ("Inferred shape and existing
    shape differ").
    """
    model = onnx.load(path, load_external_data=False)
    model.producer_name = "clip-deploy"
    model.doc_string = ""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
