"""INT8 graphs on disk: ranges, Q/DQ, and the search for what must stay in floating point."""

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
    """Write `model` in INT8 to `target`, with as many layers quantised as the gate lets through.

    Args:
        model: the fp32 graph.
        source: of `batches`, for the manifest.
        judged: describes and judges the file at `target`.

    Returns:
        The artifact that passed with the fewest layers left out; if none did, the last one tried.
    """
    every = layers(model)
    done = 0

    def count(what: str, total: int) -> Callable[[], None]:
        nonlocal done
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            progress(what, done, total)

        return step

    ranges = activation_ranges(
        model,
        activations(every),
        batches,
        method,
        count("calibrating", len(batches) * runs(method)),
    )
    quantisation = Quantisation(method=method, calibration=source, layers=len(every))

    def attempt(plan: Quantisation) -> Artifact:
        graph = quantise(model, ranges, plan.excluded)
        onnx.checker.check_model(graph)
        onnx.save(graph, target)
        return judged(plan)

    artifact = attempt(quantisation)
    if _passed(artifact):
        return artifact
    costs = sensitivity(
        model, ranges, batches[:2], count("sensitivity of each layer", len(activations(every)))
    )
    quantisation = replace(quantisation, sensitivity=costs)

    def passes(excluded: tuple[str, ...]) -> bool:
        nonlocal artifact
        progress(f"without {len(excluded)} of {len(every)} layers")
        artifact = attempt(replace(quantisation, excluded=excluded))
        return _passed(artifact)

    found = fewest(costs, passes)
    if found is not None and artifact.quantisation != replace(quantisation, excluded=found):
        artifact = attempt(replace(quantisation, excluded=found))  # the last one tried had failed
    return artifact


def _passed(artifact: Artifact) -> bool:
    return bool(artifact.verdicts) and all(verdict.passed for verdict in artifact.verdicts)


def write_dynamic(source: Path, target: Path) -> None:
    """ONNX Runtime's dynamic quantisation: INT8 weights, activations quantised at run time.

    A baseline: needs no calibration, runs on ONNX Runtime alone.
    """
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends a preprocessing that does nothing here
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
