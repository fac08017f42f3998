"""Prefix trees: texts arranged as trees of tokens, so that a shared prefix is computed once.

CLIP's text tower is causal: the activations of a token depend only on this token and on those
before it. Thus "a photo of a red car." and "a photo of a red bus." can share the activations of "a
photo of a red". The texts of labels x templates need about a third of their tokens that way.

A batch of trees is int32 [rows, 2, nodes]: the token ids, and `ends`, for each node the index
behind its last descendant. A row lists its nodes in depth-first order. Node j is therefore node i
or an ancestor of node i iff j <= i < ends[j]; attention mask and positions follow from that. A text
is the path from a root to a leaf, and each leaf is an end-of-text token. The prefix-tree graph
returns one embedding for each leaf, row by row.

This module does not know how trees are run (`serving.runners.prefix_tree`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NODES = 96
"""Maximum number of nodes in a row, unless a single text is longer. Longer rows repeat fewer
tokens, but compute more attention between nodes that the mask then hides."""
ROWS = 4
"""Maximum number of rows in a batch."""

Ids = NDArray[np.int32]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Trees:
    """A batch of prefix trees, and the positions of its texts' embeddings in the result."""

    nodes: Ids
    """[rows, 2, nodes]; rows are padded with isolated nodes that are not leaves."""
    texts: Indices
    """Indices of the texts in this batch."""
    leaves: Indices
    """For each of `texts`, the index of its leaf in the batch; equal texts have the same leaf."""


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Texts in lexicographic order of their token ids."""

    order: Indices
    ids: Ids
    lengths: Indices
    shared: Indices
    """Length of the prefix that each text shares with the text before it, in tokens."""


def shared_tokens(ids: Ids, end_id: int) -> int:
    """Return the number of tokens of `ids`, int32 [texts, length], that prefix trees can save."""
    return int(_sorted(ids, end_id).shared.sum())


def trees(ids: Ids, end_id: int, nodes: int = NODES, rows: int = ROWS) -> Iterator[Trees]:
    """Yield batches of prefix trees that together contain each of the texts.

    Args:
        ids: int32 [texts, length]; a text ends at its first `end_id`, the rest is padding.
        end_id: the end-of-text token.
        nodes: maximum number of nodes in a row; raised to the length of the longest text.
        rows: maximum number of rows in a batch.

    Raises:
        ValueError: a text has no `end_id`.
    """
    texts = _sorted(ids, end_id)
    starts = _row_starts(texts, max(nodes, int(texts.lengths.max(initial=0))))
    texts.shared[starts] = 0  # rows are independent: the first text of each is computed in full
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
    shared[1:] = np.minimum(alike, lengths[1:])  # equal texts also share their padding
    return _Sorted(order, ids, lengths, shared)


def _row_starts(texts: _Sorted, nodes: int) -> list[int]:
    """Return the first text of each row; rows are filled one after the other."""
    new = np.cumsum(texts.lengths - texts.shared)
    starts, start = [], 0
    while start < len(new):
        starts.append(start)
        # A row of the texts start to t has lengths[start] + new[t] - new[start] nodes.
        room = nodes - texts.lengths[start] + new[start]
        start = int(np.searchsorted(new, room, side="right"))
    return starts


def _batch(texts: _Sorted, bounds: Indices, padding: int) -> Trees:
    """Return the batch whose rows begin at the texts `bounds[:-1]`."""
    some = slice(bounds[0], bounds[-1])
    columns = np.arange(texts.ids.shape[1])
    new = (columns >= texts.shared[some, None]) & (columns < texts.lengths[some, None])
    counts = new.sum(axis=1)
    # All nodes of all rows, concatenated. Each text branches off a node of the text before it.
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
    """Return for each node the index of the next node that is not deeper, or the end."""
    ends = np.empty_like(depths)
    for depth in range(int(depths.max()) + 1):
        here = np.flatnonzero(depths == depth)
        others = np.append(np.flatnonzero(depths <= depth), len(depths))
        ends[here] = others[np.searchsorted(others, here, side="right")]
    return ends
