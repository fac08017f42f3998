"""Export of a tower to an ONNX file with dynamic axes.

The ONNX checker validates the file. `export.gate` checks that its embeddings are right.
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
"""ONNX opset of the graphs. LayerNormalization is one node since 17; every runtime supports 20."""

PROTOBUF_LIMIT = 2_000_000_000
"""Maximum size of weights inside the ONNX file, in bytes. Larger ones go to a separate file,
because a protobuf message is limited to 2 GiB."""


BOUNDARY = {
    ImageTower: ("pixels", "image_embeds"),
    TextTower: ("input_ids", "text_embeds"),
    PrefixTreeTower: ("trees", "text_embeds"),
}
"""Names of the input and the output of each graph."""


def example_batch(tower: nn.Module) -> tuple[torch.Tensor, dict[int, torch.export.Dim]]:
    """Return an example input of the tower, and its dynamic axes."""
    batch = torch.export.Dim("batch", min=1)
    if isinstance(tower, ImageTower):
        size = tower.config.image_size
        return torch.zeros(2, 3, size, size, dtype=torch.uint8), {0: batch}
    if isinstance(tower, TextTower):
        config = tower.config
        ids = torch.full((2, config.context_length), config.end_id, dtype=torch.int32)
        # Longer texts are cut off in the graph, which the exporter would otherwise leave out.
        length = torch.export.Dim("length", min=2, max=2 * config.context_length)
        return ids, {0: batch, 1: length}
    if isinstance(tower, PrefixTreeTower):
        trees = torch.full((2, 2, 9), tower.tower.config.end_id, dtype=torch.int32)
        return trees, {0: torch.export.Dim("rows", min=1), 2: torch.export.Dim("nodes", min=2)}
    raise TypeError(
        f"expected an ImageTower, a TextTower or a PrefixTreeTower, got {type(tower).__name__}"
    )


def export_onnx(tower: nn.Module, path: Path, metadata: dict[str, str]) -> list[Path]:
    """Write `tower` to `path`. Weights above 2 GB go to `<path>.data`.

    The input and output are those of `export.towers.clip` or `export.towers.prefix_tree`.

    Args:
        tower: the tower to export.
        path: the ONNX file to write.
        metadata: properties to store as the graph's `metadata_props`.

    Returns:
        The files written, the graph first.
    """
    example, dynamic = example_batch(tower)
    input_name, output_name = BOUNDARY[type(tower)]
    # The exporter logs a line for every torchvision operator that it cannot register.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # deprecations in the exporter's own code
        program = torch.onnx.export(
            tower.eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[output_name],
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    external = weights_bytes(tower) > PROTOBUF_LIMIT
    program.save(path, external_data=external)
    _clean(path, metadata)
    onnx.checker.check_model(path, full_check=True)
    return [path, path.with_name(path.name + ".data")] if external else [path]


def weights_bytes(tower: nn.Module) -> int:
    """Return the size of a tower's weights in bytes."""
    return sum(t.numel() * t.element_size() for t in tower.state_dict().values())


def _clean(path: Path, metadata: dict[str, str]) -> None:
    """Add metadata, and remove stack traces, which name local files, and stale shapes.

    ONNX Runtime's quantizer rejects the exporter's `value_info`: "Inferred shape and existing shape
    differ".
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
