"""Combined queries, and exact nearest-neighbor search with NumPy alone.

`serving.search.index` searches an index directory with FAISS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.inputs.images import ImageInput
from serving.tasks.embedder import Embedder, Floats
from serving.util.finite import is_float32

_CANCELLED = 1e-4
"""Minimum length of a sum of terms. Below it, its direction is rounding error."""


def nearest(
    queries: NDArray[np.float32], embeddings: NDArray[np.float32], count: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Find the nearest unit vectors by cosine, exactly.

    Args:
        queries: float32 [q, dim], unit length.
        embeddings: float32 [n, dim], unit length.
        count: hits per query, limited to n.

    Returns:
        Indices [q, count] into `embeddings`, best first, and their cosines, float32 [q, count].
        If cosines are equal, the lower index comes first.

    Raises:
        InputError: queries and embeddings have different dimensions.
    """
    if queries.ndim != 2 or embeddings.ndim != 2 or queries.shape[1] != embeddings.shape[1]:
        raise InputError(
            "expected queries [q, dim] and embeddings [n, dim] of the same model, got "
            f"{list(queries.shape)} and {list(embeddings.shape)}"
        )
    cosines = queries @ embeddings.T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(cosines, order, axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Part of a query: a text or an image, and its weight."""

    text: str | None = None
    picture: ImageInput | None = None
    weight: float = 1.0
    """Factor of the term's unit vector in the sum. Negative weights move the query away from it."""


def query_vector(embedder: Embedder, terms: Sequence[Term], *, truncate: bool = False) -> Floats:
    """Return the unit vector of a combined query, float32 [dim].

    The embeddings of the terms, which have unit length, are multiplied by their weights and added,
    and the sum is scaled to unit length. Images lie closer to other images than texts do. In a
    query of a text and an image with equal weights, the image therefore dominates; give it a
    smaller weight.

    Raises:
        InputError: no weight is positive, a weight is zero or not finite, a term does not have
            either a text or an image, or the terms cancel each other out.
        TextError: a text cannot be used, or it is too long and `truncate` is not set.
        ImageError: an image cannot be used.
    """
    for term in terms:
        if (term.text is None) == (term.picture is None):
            raise InputError(
                "expected a query term with either a text or an image, got "
                + ("neither" if term.text is None else "both")
            )
        if not is_float32(term.weight) or term.weight == 0:
            raise InputError(
                f"expected a weight other than 0 that is finite in float32, got {term.weight:g}",
                advice="give a weight such as 1, 0.5 or -1",
            )
    if not any(term.weight > 0 for term in terms):
        raise InputError(
            "nothing to search for: no term has a positive weight",
            advice="give at least one text or image; negative weights only subtract from it",
        )
    texts = [(t.text, t.weight) for t in terms if t.text is not None]
    images = [(t.picture, t.weight) for t in terms if t.picture is not None]
    parts, weights = [], [weight for _, weight in texts + images]
    if texts:
        parts.append(embedder.embed_texts([text for text, _ in texts], truncate=truncate))
    if images:
        parts.append(embedder.embed_images([image for image, _ in images]))
    # Only the direction of the sum matters. Relative to the largest weight, nothing overflows.
    relative = np.array(weights) / max(map(abs, weights))
    total = relative.astype(np.float32) @ np.concatenate(parts)
    length = float(np.linalg.norm(total))
    if length < _CANCELLED:
        raise InputError(
            "the terms of the query cancel each other out", advice="change the weights"
        )
    unit: Floats = total / np.float32(length)
    return unit
