"""Activation ranges of a graph, by minmax, percentile or entropy calibration.

Quantization is symmetric, so a range is one number per tensor: the magnitude mapped to 127.
`export.int8.qdq` quantizes with these ranges.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export.int8 import Method
from serving.errors import ExportError
from serving.runners.base import Batch
from serving.util.machine import cpu_count

Floats = NDArray[np.float64]

BINS = 2048
PERCENTILE = 99.99
"""Percentile of magnitudes used as a range. Larger magnitudes saturate."""

_LEVELS = 128


def activation_ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    method: Method,
    progress: Callable[[], None],
) -> dict[str, float]:
    """Measure the range of each of `tensors` over `batches`.

    The result is deterministic: the same batches give the same ranges.

    Args:
        model: a graph with one input. It must fit into one protobuf message (2 GB).
        tensors: names of tensors in the graph.
        batches: calibration data. `percentile` and `entropy` run each batch twice.
        method: method that chooses a range.
        progress: called after each run.

    Returns:
        For each tensor, the magnitude to map to 127.

    Raises:
        ExportError: an activation is not finite.
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
            if not np.isfinite(values).all():
                raise ExportError(
                    f"the activation {name} is not finite on calibration data, so it cannot be "
                    "quantized",
                    advice="leave out the INT8 precision of this graph; int8-fp16 requires "
                    "activations that fit float16",
                )
            largest[name] = max(largest[name], float(np.abs(values).max()))
    if method == "minmax":
        return largest
    histograms = {name: np.zeros(BINS, np.int64) for name in tensors}
    for batch in batches:
        for name, values in outputs(batch).items():
            # Use float32, because float16 cannot represent the edges of such narrow bins.
            magnitudes = np.abs(values).astype(np.float32)
            counts, _ = np.histogram(magnitudes, BINS, (0.0, largest[name] or 1.0))
            histograms[name] += counts
    choose = _percentile if method == "percentile" else _entropy
    return {name: largest[name] * choose(histograms[name]) for name in tensors}


def runs(method: Method) -> int:
    """Return the number of times that `activation_ranges` runs each batch."""
    return 1 if method == "minmax" else 2


def _session_with_outputs(
    model: onnx.ModelProto, tensors: Sequence[str]
) -> onnxruntime.InferenceSession:
    known = {output.name for output in model.graph.output}
    watched = [onnx.ValueInfoProto(name=name) for name in tensors if name not in known]
    # Add the outputs to the model itself and remove them again: a copy could take gigabytes.
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
    """Return the range at PERCENTILE of all magnitudes, as a fraction of the largest one."""
    below = np.cumsum(histogram) / max(histogram.sum(), 1)
    return float(np.searchsorted(below, PERCENTILE / 100) + 1) / BINS


def _entropy(histogram: NDArray[np.int64]) -> float:
    """Return the range that loses the least information, as a fraction of the largest magnitude.

    This is the search of TensorRT's entropy calibration (Migacz, "8-bit Inference with TensorRT",
    GTC 2017), at every eighth bin. It minimizes the Kullback-Leibler divergence between the clipped
    distribution and its quantization to 128 levels.
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
    quantized = np.where(filled, (mass / np.maximum(cells, 1))[level], 0.0)
    if not quantized.sum():
        return float("inf")
    p, q = clipped / clipped.sum(), quantized / quantized.sum()
    nonzero = p > 0
    # Outliers are clipped into the last bin. If it was empty, q is 0 there, and without this lower
    # bound the divergence would be infinite.
    return float((p[nonzero] * np.log(p[nonzero] / np.maximum(q[nonzero], 1e-9))).sum())
