"""Builds of TensorRT-RTX engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from export.engines.builder import EngineOptions, build_plan
from export.gate.datasets import probe_images, probe_texts
from export.int8.qdq import layers, quantise
from export.int8.ranges import activation_ranges
from export.int8.sensitivity import activations
from serving.bundles.bundle import Bundle
from serving.bundles.engine_facts import Engine
from serving.bundles.manifest import Manifest, Tower
from serving.util.files import sha256_of
from serving.util.progress import silent

PRECISIONS = ("fp32", "fp16", "int8", "int8-fp16")


OPTIONS = EngineOptions(library="tensorrt-rtx")


SLOWEST_S = 60


def write_int8(graph: Path, target: Path, manifest: Manifest) -> None:
    """Quantize `graph` with the ranges of one small batch. Enough for a build; accuracy does not
    matter."""
    model = onnx.load(graph)
    image = graph.name.startswith("image")
    batch = probe_images(manifest.image, 2) if image else probe_texts(manifest.text, 2, 16)
    names = activations(layers(model))
    ranges = activation_ranges(model, names, [batch], "minmax", lambda: None)
    onnx.save(quantise(model, ranges), target)


class Graph(NamedTuple):
    """Input of an engine build."""

    path: Path
    tower: Tower
    manifest: Manifest


def graph_of(bundle: Bundle, tower: Tower, precision: str) -> Graph:
    return Graph(bundle.verified(bundle.artifact(tower, precision)), tower, bundle.manifest)


def built(
    graph: Graph, options: EngineOptions = OPTIONS, progress: Any = silent
) -> tuple[bytes, Engine]:
    sha256 = sha256_of(graph.path) if graph.path.is_file() else ""
    return build_plan(graph.path, sha256, graph.tower, graph.manifest, options, progress)


def after(calls: int, then: Callable[[], None]) -> Callable[..., None]:
    """Return a progress callback that calls `then` once, `calls` steps after the start."""
    left = calls

    def progress(step: str, done: int = 0, total: int = 0) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            then()

    return progress
