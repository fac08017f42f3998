"""Choice of layers to exclude from INT8 when the fully quantized graph fails the parity gate."""

import math
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

_WORST = 2.0
"""Cosine loss of layers without which embeddings are not finite: that of opposite vectors."""
LARGEST_SHARE = 0.5
"""Maximum fraction of activations to exclude. With more in floating point, INT8 gains nothing."""


def sensitivity(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    batches: Sequence[Batch],
    progress: Callable[[], None],
) -> tuple[LayerCost, ...]:
    """Measure the cosine loss of quantizing the layers of one activation at a time.

    Layers that read the same tensor are quantized together, because the tensor has one range.

    Args:
        model: a floating-point graph.
        ranges: for each layer's activation, the magnitude that is mapped to 127.
        batches: batches to embed.
        progress: called after each activation.

    Returns:
        The loss of each group of layers, the largest first.
    """
    candidates = layers(model)
    reference = _embed(model, batches)
    costs = []
    for activation in activations(candidates):
        group = tuple(layer.name for layer in candidates if layer.activation == activation)
        others = [layer.name for layer in candidates if layer.activation != activation]
        embeddings = _embed(quantise(model, ranges, exclude=others), batches)
        loss = 1 - float((embeddings * reference).sum(axis=1).mean())
        loss = max(loss, 0.0) if math.isfinite(loss) else _WORST
        costs.append(LayerCost(layers=group, cosine_loss=loss))
        progress()
    return tuple(sorted(costs, key=lambda cost: -cost.cosine_loss))


def fewest(
    costs: Sequence[LayerCost], passes: Callable[[tuple[str, ...]], bool]
) -> tuple[str, ...] | None:
    """Find the smallest number of costliest layers whose exclusion makes `passes` return True.

    The search doubles the number until it passes, then bisects between the last failure and the
    first success.

    Args:
        costs: groups of layers, the costliest first.
        passes: returns whether the graph passes the parity gate without the given layers.

    Returns:
        Names of the layers to exclude, the costliest first; None if excluding LARGEST_SHARE of
        the groups is not enough.
    """

    def costliest(count: int) -> tuple[str, ...]:
        return tuple(name for cost in costs[:count] for name in cost.layers)

    failed, passed, limit = 0, 1, int(len(costs) * LARGEST_SHARE)
    while passed <= limit and not passes(costliest(passed)):
        failed, passed = passed, limit if passed < limit < 2 * passed else 2 * passed
    if passed > limit:
        return None
    while passed - failed > 1:
        middle = (failed + passed) // 2
        failed, passed = (failed, middle) if passes(costliest(middle)) else (middle, passed)
    return costliest(passed)


def activations(every: Iterable[Layer]) -> list[str]:
    """Return the activations of the layers, without duplicates."""
    return list(dict.fromkeys(layer.activation for layer in every))


def _embed(model: onnx.ModelProto, batches: Sequence[Batch]) -> NDArray[np.float32]:
    options = session_options(cpu_count(), int8=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {feed: batch})[0] for batch in batches])
