"""When the gate refuses INT8: which layers cost most, and how many must stay out?"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export.to_int8 import Layer, layers, quantise
from serving.bundle import LayerCost
from serving.machine import cpu_count
from serving.runners.base import Batch

LARGEST_SHARE = 0.5
"""Of layers that may stay out; with more of them in floating point, INT8 has nothing to offer."""


def sensitivity(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    batches: Sequence[Batch],
    progress: Callable[[], None],
) -> tuple[LayerCost, ...]:
    """Quantise each layer alone and see how far embeddings turn; dearest layer first.

    Args:
        model: the fp32 graph.
        progress: called after each layer.
    """
    every = layers(model)
    names = [layer.name for layer in every]
    reference = _embed(model, batches)
    costs = []
    for layer in every:
        others = [name for name in names if name != layer.name]
        embeddings = _embed(quantise(model, ranges, exclude=others), batches)
        loss = 1 - float((embeddings * reference).sum(axis=1).mean())
        costs.append(LayerCost(layer=layer.name, cosine_loss=max(loss, 0.0)))
        progress()
    return tuple(sorted(costs, key=lambda cost: -cost.cosine_loss))


def exclusions(costs: Sequence[LayerCost]) -> Iterator[tuple[str, ...]]:
    """What to leave out next: the dearest 1, 2, 4, 8 ... layers, up to LARGEST_SHARE of all."""
    count = 1
    while count <= len(costs) * LARGEST_SHARE:
        yield tuple(cost.layer for cost in costs[:count])
        count *= 2


def activations(every: Iterable[Layer]) -> list[str]:
    """The tensors whose ranges are needed, each once."""
    return list(dict.fromkeys(layer.activation for layer in every))


def _embed(model: onnx.ModelProto, batches: Sequence[Batch]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {feed: batch})[0] for batch in batches])
