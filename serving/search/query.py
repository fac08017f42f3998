"""What is looked for, and which embeddings are nearest to it: exactly, by NumPy alone.

`search_index.py` keeps embeddings in a folder and asks FAISS; `search_build.py` fills it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.inputs.preprocess import Picture
from serving.tasks.embedder import Embedder, Floats

_CANCELLED = 1e-4
"""Below this length the direction of a sum is rounding error."""


def nearest(
    queries: NDArray[np.float32], embeddings: NDArray[np.float32], count: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Exact search by cosine over unit vectors.

    Args:
        queries: float32 [q, dim], unit length.
        embeddings: float32 [n, dim], unit length.
        count: hits a query; no more than n come back.

    Returns:
        Indices [q, count] into `embeddings`, best first, and their cosines, float32 [q, count].
        Of equal cosines the lower index comes first.

    Raises:
        InputError: the two are not of the same dimension.
    """
    if queries.ndim != 2 or embeddings.ndim != 2 or queries.shape[1] != embeddings.shape[1]:
        raise InputError(
            f"queries {list(queries.shape)} and embeddings {list(embeddings.shape)} do not fit; "
            "expected [q, dim] and [n, dim] from the same model"
        )
    cosines = queries @ embeddings.T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(cosines, order, axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of a query: a text or a picture, and how much of it is wanted."""

    text: str | None = None
    picture: Picture | None = None
    weight: float = 1.0
    """Of its unit vector in the sum; below zero: away from it."""


def query_vector(embedder: Embedder, terms: Sequence[Term], *, truncate: bool = False) -> Floats:
    """The unit vector of a combined query, float32 [dim].

    Each term's embedding has unit length; they are multiplied by their weights, added, and the sum
    is brought back to unit length. Pictures lie nearer to pictures than texts do, so that of a text
    and a picture with equal weights the picture decides more: give it less.

    Raises:
        InputError: nothing is looked for, a weight is no number other than zero, a term is not
            either a text or a picture, or the terms cancel each other out.
        TextError, ImageError: a term cannot be used; a text too long unless `truncate` is set.
    """
    for term in terms:
        if (term.text is None) == (term.picture is None):
            raise InputError("a term of a query is either a text or a picture; give one of them")
        if not math.isfinite(term.weight) or term.weight == 0:
            raise InputError(f"a weight of {term.weight:g} says nothing; expected 1, 0.5, -1, ...")
    if not any(term.weight > 0 for term in terms):
        raise InputError(
            "nothing to look for; give at least one text or picture with a weight above zero "
            "(what is not wanted can only be taken from that)"
        )
    texts = [(t.text, t.weight) for t in terms if t.text is not None]
    pictures = [(t.picture, t.weight) for t in terms if t.picture is not None]
    parts, weights = [], [weight for _, weight in texts + pictures]
    if texts:
        parts.append(embedder.embed_texts([text for text, _ in texts], truncate=truncate))
    if pictures:
        parts.append(embedder.embed_images([picture for picture, _ in pictures]))
    total = np.array(weights, np.float32) @ np.concatenate(parts)
    length = float(np.linalg.norm(total))
    if length < _CANCELLED * max(map(abs, weights)):
        raise InputError("the terms of the query cancel each other out; change their weights")
    unit: Floats = total / np.float32(length)
    return unit
