"""Export of a tower to a traced and frozen TorchScript file, for serving with libtorch."""

import warnings
from pathlib import Path

import torch

from export.graphs.onnx_export import example_batch
from export.towers.clip import ImageTower, TextTower, for_inference


def export_torchscript(tower: ImageTower | TextTower, path: Path) -> None:
    """Write `tower` in float32 to `path`. Input and output are those of `export.towers.clip`."""
    example, _ = example_batch(tower)
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and shapes are Python values
        traced = torch.jit.trace(for_inference(tower), example)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), path)
