"""Writing of INT8 graphs: calibration, quantization, and the choice of layers to exclude."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from export.int8 import Method
from export.int8.qdq import layers, quantise
from export.int8.ranges import activation_ranges, runs
from export.int8.sensitivity import activations, fewest, sensitivity
from serving.bundles.manifest import Artifact, Quantisation
from serving.runners.base import Batch
from serving.util.progress import Progress


def write_int8(
    model: onnx.ModelProto,
    target: Path,
    batches: list[Batch],
    source: str,
    method: Method,
    judged: Callable[[Quantisation], Artifact],
    progress: Progress,
) -> Artifact:
    """Write `model` in INT8 to `target`, with as few excluded layers as the parity gate allows.

    Args:
        model: a floating-point graph.
        target: file to write; each attempt overwrites it.
        batches: calibration data.
        source: description of `batches`, for the manifest.
        method: method that chooses activation ranges.
        judged: runs the parity gate on the file at `target` and returns the artifact with verdicts.
        progress: called with each step.

    Returns:
        The artifact that passed with the fewest excluded layers; if none passed, the last attempt.
    """
    candidates = layers(model)
    done = 0

    def count(title: str, total: int) -> Callable[[], None]:
        nonlocal done
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            progress(title, done, total)

        return step

    ranges = activation_ranges(
        model,
        activations(candidates),
        batches,
        method,
        count("calibrating", len(batches) * runs(method)),
    )
    quantization = Quantisation(method=method, calibration=source, layers=len(candidates))

    def attempt(quantization: Quantisation) -> Artifact:
        graph = quantise(model, ranges, quantization.excluded)
        onnx.checker.check_model(graph)
        onnx.save(graph, target)
        return judged(quantization)

    artifact = attempt(quantization)
    if _passed(artifact):
        return artifact
    costs = sensitivity(
        model, ranges, batches[:2], count("sensitivity of each layer", len(activations(candidates)))
    )
    quantization = replace(quantization, sensitivity=costs)

    def passes(excluded: tuple[str, ...]) -> bool:
        nonlocal artifact
        progress(f"excluding {len(excluded)} of {len(candidates)} layers")
        artifact = attempt(replace(quantization, excluded=excluded))
        return _passed(artifact)

    found = fewest(costs, passes)
    if found is not None and artifact.quantisation != replace(quantization, excluded=found):
        # The last attempt of the search failed and overwrote the file that passed.
        artifact = attempt(replace(quantization, excluded=found))
    return artifact


def _passed(artifact: Artifact) -> bool:
    return bool(artifact.verdicts) and all(verdict.passed for verdict in artifact.verdicts)


def write_dynamic(source: Path, target: Path) -> None:
    """Write a graph with INT8 weights whose activations ONNX Runtime quantizes at run time.

    This is a baseline. It needs no calibration data and runs only on ONNX Runtime.
    """
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends a preprocessing step with no effect here
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    finally:
        logger.setLevel(level)
