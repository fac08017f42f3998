"""Texts that begin alike as trees of tokens: what they share is computed once.

CLIP's text tower is causal: what becomes of a token depends on it and on the tokens before it. So
"a photo of a red car." and "a photo of a red bus." may have one "a photo of a red" between them,
and labels x templates need about a third of the tokens that they have.

A batch of trees is int32 [rows, 2, nodes]: token ids, and for each node the index behind its last
descendant. A row lists its nodes depth first, so node j is node i or stands before it in a text
iff j <= i < ends[j]; mask and positions follow from that. A text is the way to a leaf, which is an
end-of-text token, and what computes a batch gives one embedding a leaf, row by row.

Does not know: what computes them (`runners.text_tree`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NODES = 96
"""Of a row, unless a text is longer. In a longer row less is repeated, and more nodes attend to
more nodes that they then do not see."""
ROWS = 4
"""Of a batch."""

Ids = NDArray[np.int32]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Trees:
    """A batch, and where the embeddings of its texts are to be found."""

    nodes: Ids
    """[rows, 2, nodes]; behind a row's last node come others that stand alone and are no leaves."""
    texts: Indices
    """Which of the texts are in it."""
    leaves: Indices
    """For each of `texts` the number of its leaf; equal texts have the same."""


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Texts in the order of their token ids."""

    order: Indices
    ids: Ids
    lengths: Indices
    shared: Indices
    """How many tokens a text has in common with the one before it."""


def shared_tokens(ids: Ids, end_id: int) -> int:
    """How many of the tokens of `ids`, int32 [texts, length], a tree has in common with others."""
    return int(_sorted(ids, end_id).shared.sum())


def trees(ids: Ids, end_id: int, nodes: int = NODES, rows: int = ROWS) -> Iterator[Trees]:
    """Batches of trees that hold each of the texts once.

    Args:
        ids: int32 [texts, length]; a text ends at its first `end_id`, what follows is padding.
        nodes: of a row, at most; a text that is longer gets a row of its length.
        rows: of a batch, at most.

    Raises:
        ValueError: a text has no `end_id`.
    """
    texts = _sorted(ids, end_id)
    starts = _row_starts(texts, max(nodes, int(texts.lengths.max(initial=0))))
    texts.shared[starts] = 0  # a row repeats what its first text shares with the row before
    bounds = [*starts, len(ids)]
    for first in range(0, len(starts), rows):
        last = min(first + rows, len(starts))
        yield _batch(texts, np.array(bounds[first : last + 1]), int(end_id == 0))


def _sorted(ids: Ids, end_id: int) -> _Sorted:
    ends = ids == end_id
    if not ends.any(axis=1).all():
        raise ValueError(f"expected every text to have the end-of-text token {end_id}")
    lengths = ends.argmax(axis=1) + 1
    ids = np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, -1)
    order = np.lexsort(ids.T[::-1])
    ids, lengths = ids[order], lengths[order]
    shared = np.zeros(len(ids), np.intp)
    alike = np.logical_and.accumulate(ids[1:] == ids[:-1], axis=1).sum(axis=1)
    shared[1:] = np.minimum(alike, lengths[1:])  # of equal texts the padding is alike too
    return _Sorted(order, ids, lengths, shared)


def _row_starts(texts: _Sorted, nodes: int) -> list[int]:
    """The first text of each row, when rows are filled one after the other."""
    new = np.cumsum(texts.lengths - texts.shared)
    starts, start = [], 0
    while start < len(new):
        starts.append(start)
        # Up to text t a row has lengths[start] + new[t] - new[start] nodes.
        room = nodes - texts.lengths[start] + new[start]
        start = int(np.searchsorted(new, room, side="right"))
    return starts


def _batch(texts: _Sorted, bounds: Indices, padding: int) -> Trees:
    """The rows that begin at texts `bounds[:-1]`."""
    some = slice(bounds[0], bounds[-1])
    columns = np.arange(texts.ids.shape[1])
    new = (columns >= texts.shared[some, None]) & (columns < texts.lengths[some, None])
    counts = new.sum(axis=1)
    # All nodes of all rows, one after the other; a new text goes on from a node of the one before.
    depths = np.nonzero(new)[1]
    sizes = np.add.reduceat(counts, bounds[:-1] - bounds[0])
    offsets = np.repeat(np.cumsum(sizes) - sizes, sizes)
    row = np.repeat(np.arange(len(sizes)), sizes)
    column = np.arange(len(depths)) - offsets
    nodes = np.empty((len(sizes), 2, sizes.max()), np.int32)
    nodes[:, 0], nodes[:, 1] = padding, np.arange(1, sizes.max() + 1)
    nodes[row, 0, column] = texts.ids[some][new]
    nodes[row, 1, column] = _subtree_ends(depths) - offsets
    return Trees(nodes, texts.order[some], np.cumsum(counts > 0) - 1)


def _subtree_ends(depths: Indices) -> Indices:
    """For each node the next that is no deeper, or the end."""
    ends = np.empty_like(depths)
    for depth in range(int(depths.max()) + 1):
        here = np.flatnonzero(depths == depth)
        others = np.append(np.flatnonzero(depths <= depth), len(depths))
        ends[here] = others[np.searchsorted(others, here, side="right")]
    return ends
