"""When the gate refuses INT8: which layers cost most, and how many must stay out?"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export.int8.qdq import Layer, layers, quantise
from serving.bundles.manifest import LayerCost
from serving.runners.base import Batch
from serving.runners.onnx_runtime import session_options
from serving.util.machine import cpu_count

LARGEST_SHARE = 0.5
"""Of layers that may stay out; with more of them in floating point, INT8 has nothing to offer."""


def sensitivity(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    batches: Sequence[Batch],
    progress: Callable[[], None],
) -> tuple[LayerCost, ...]:
    """Quantise each activation's layers alone and see how far embeddings turn; dearest first.

    Layers that read one tensor stand and fall together: its one range is what hurts them.

    Args:
        model: the fp32 graph.
        progress: called once an activation.
    """
    every = layers(model)
    reference = _embed(model, batches)
    costs = []
    for activation in activations(every):
        together = tuple(layer.name for layer in every if layer.activation == activation)
        others = [layer.name for layer in every if layer.activation != activation]
        embeddings = _embed(quantise(model, ranges, exclude=others), batches)
        loss = 1 - float((embeddings * reference).sum(axis=1).mean())
        costs.append(LayerCost(layers=together, cosine_loss=max(loss, 0.0)))
        progress()
    return tuple(sorted(costs, key=lambda cost: -cost.cosine_loss))


def fewest(
    costs: Sequence[LayerCost], passes: Callable[[tuple[str, ...]], bool]
) -> tuple[str, ...] | None:
    """The fewest of the dearest layers without which `passes` says yes.

    Doubles their number until it does, then bisects between the last no and the first yes.

    Returns:
        Their names, dearest first; None where even LARGEST_SHARE of all is not enough.
    """

    def dearest(count: int) -> tuple[str, ...]:
        return tuple(name for cost in costs[:count] for name in cost.layers)

    failed, passed, limit = 0, 1, int(len(costs) * LARGEST_SHARE)
    while passed <= limit and not passes(dearest(passed)):
        failed, passed = passed, limit if passed < limit < 2 * passed else 2 * passed
    if passed > limit:
        return None
    while passed - failed > 1:
        middle = (failed + passed) // 2
        failed, passed = (failed, middle) if passes(dearest(middle)) else (middle, passed)
    return dearest(passed)


def activations(every: Iterable[Layer]) -> list[str]:
    """The tensors whose ranges are needed, each once."""
    return list(dict.fromkeys(layer.activation for layer in every))


def _embed(model: onnx.ModelProto, batches: Sequence[Batch]) -> NDArray[np.float32]:
    options = session_options(cpu_count(), int8=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {feed: batch})[0] for batch in batches])
