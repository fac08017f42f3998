"""How far a graph's activations reach: MinMax, Percentile and Entropy calibration.

INT8 is symmetric here, so a range is one number a tensor: the magnitude that becomes 127.

Does not know: what is quantised with the ranges (`to_int8.py`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export.int8 import Method
from serving.runners.base import Batch
from serving.util.machine import cpu_count

Floats = NDArray[np.float64]

BINS = 2048
PERCENTILE = 99.99
"""Of magnitudes; what lies beyond saturates."""

_LEVELS = 128


def activation_ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    method: Method,
    progress: Callable[[], None],
) -> dict[str, float]:
    """The magnitude each of `tensors` is to be quantised up to, measured over `batches`.

    Args:
        model: a graph with one input, small enough for one protobuf (2 GB).
        batches: run one after the other; kept in memory by nobody here, but run twice for
            histograms, so a sequence is needed for `percentile` and `entropy`.
        progress: called after each run.

    Deterministic: the same batches give the same ranges.
    """
    session = _session_with_outputs(model, tensors)
    feed = session.get_inputs()[0].name

    def outputs(batch: Batch) -> Mapping[str, NDArray[np.float32]]:
        values = session.run(list(tensors), {feed: batch})
        progress()
        return dict(zip(tensors, values, strict=True))

    batches = list(batches)
    largest = dict.fromkeys(tensors, 0.0)
    for batch in batches:
        for name, values in outputs(batch).items():
            largest[name] = max(largest[name], float(np.abs(values).max()))
    if method == "minmax":
        return largest
    histograms = {name: np.zeros(BINS, np.int64) for name in tensors}
    for batch in batches:
        for name, values in outputs(batch).items():
            # Bins of a float16 tensor would be narrower than its numbers are apart.
            magnitudes = np.abs(values).astype(np.float32)
            counts, _ = np.histogram(magnitudes, BINS, (0.0, largest[name] or 1.0))
            histograms[name] += counts
    choose = _percentile if method == "percentile" else _entropy
    return {name: largest[name] * choose(histograms[name]) for name in tensors}


def runs(method: Method) -> int:
    """How often `activation_ranges` runs each batch."""
    return 1 if method == "minmax" else 2


def _session_with_outputs(
    model: onnx.ModelProto, tensors: Sequence[str]
) -> onnxruntime.InferenceSession:
    known = {output.name for output in model.graph.output}
    watched = [onnx.ValueInfoProto(name=name) for name in tensors if name not in known]
    # Lent to the model and taken back: a copy of a large one is gigabytes.
    model.graph.output.extend(watched)
    try:
        graph = model.SerializeToString()
    finally:
        del model.graph.output[len(known) :]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _percentile(histogram: NDArray[np.int64]) -> float:
    """Share of the largest magnitude below which PERCENTILE of all magnitudes lie."""
    below = np.cumsum(histogram) / max(histogram.sum(), 1)
    return float(np.searchsorted(below, PERCENTILE / 100) + 1) / BINS


def _entropy(histogram: NDArray[np.int64]) -> float:
    """Share of the largest magnitude at which quantising loses the least information.

    The search of TensorRT's entropy calibration (Migacz, "8-bit Inference with TensorRT", GTC
    2017): for each clipping point, the divergence between the clipped distribution and what is
    left of it after 128 levels.
    """
    total = histogram.astype(np.float64)
    divergences = [_divergence(total, stop) for stop in range(_LEVELS, BINS + 1, 8)]
    return float(_LEVELS + 8 * int(np.argmin(divergences))) / BINS


def _divergence(histogram: Floats, stop: int) -> float:
    clipped = histogram[:stop].copy()
    clipped[-1] += histogram[stop:].sum()
    filled = histogram[:stop] > 0
    level = np.arange(stop) * _LEVELS // stop
    mass = np.bincount(level, histogram[:stop], _LEVELS)
    cells = np.bincount(level, filled, _LEVELS)
    quantised = np.where(filled, (mass / np.maximum(cells, 1))[level], 0.0)
    if not quantised.sum():
        return float("inf")
    p, q = clipped / clipped.sum(), quantised / quantised.sum()
    here = p > 0
    # An outlier clipped into an empty last bin has no counterpart: smooth it, as the paper does.
    return float((p[here] * np.log(p[here] / np.maximum(q[here], 1e-9))).sum())
