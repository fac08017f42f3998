"""Texts in prefix trees, compared with straightforward computations."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serving.inputs.prefix_tree import NODES, ROWS, shared_tokens, trees

START, END, PAD = 8, 9, 7
CONTEXT = 12


def padded(texts: list[tuple[int, ...]], length: int, pad: int = PAD, end: int = END) -> np.ndarray:
    """int32 [texts, length]: START, the tokens of the text, the end-of-text token, and padding."""
    ids = np.full((len(texts), length), pad, np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) + 2] = [START, *text, end]
    return ids


def spelled(nodes: np.ndarray, leaf: int) -> list[int]:
    """Tokens on the path to node `leaf` of a row int32 [2, nodes], by the mask rule."""
    tokens, ends = nodes
    return [int(tokens[j]) for j in range(len(tokens)) if j <= leaf < ends[j]]


def leaves_of(nodes: np.ndarray, end: int = END) -> list[list[int]]:
    """Token sequences of the leaves of a batch, row by row."""
    return [
        spelled(row, leaf) for row in nodes for leaf in range(row.shape[1]) if row[0, leaf] == end
    ]


texts_of_few_tokens = st.lists(
    st.lists(st.integers(0, 3), max_size=CONTEXT - 2).map(tuple), min_size=1, max_size=40
)


@given(
    texts=texts_of_few_tokens,
    more=st.integers(0, 3),
    nodes=st.integers(1, 40),
    rows=st.integers(1, 5),
    pad=st.sampled_from([PAD, END, 0]),
)
@example(texts=[()], more=0, nodes=1, rows=1, pad=PAD)
@example(texts=[(0,) * (CONTEXT - 2)], more=0, nodes=CONTEXT, rows=4, pad=END)
@example(texts=[(1, 2)] * 5 + [(1,)], more=1, nodes=4, rows=2, pad=END)
@settings(deadline=None)
def test_path_to_each_leaf_equals_its_text(texts, more, nodes, rows, pad):
    length = max(map(len, texts)) + 2 + more
    found = list(trees(padded(texts, length, pad), END, nodes, rows))
    for batch in found:
        assert batch.nodes.dtype == np.int32
        assert batch.nodes.shape[0] <= rows
        assert batch.nodes.shape[1] == 2
        assert batch.nodes.shape[2] <= max(nodes, *(len(text) + 2 for text in texts))
        leaves = leaves_of(batch.nodes)
        assert len(leaves) == batch.leaves.max() + 1
        for text, leaf in zip(batch.texts, batch.leaves, strict=True):
            assert leaves[leaf] == [START, *texts[text], END]
    assert sorted(np.concatenate([batch.texts for batch in found])) == list(range(len(texts)))
    assert all(len(batch.nodes) == rows for batch in found[:-1])


@given(texts=texts_of_few_tokens)
@settings(deadline=None)
def test_row_with_room_has_one_node_per_prefix(texts):
    """There is one node for each distinct prefix."""
    beginnings = {(START, *text, END)[:stop] for text in texts for stop in range(1, len(text) + 3)}
    ids = padded(texts, CONTEXT)
    (batch,) = trees(ids, END, nodes=1000)
    assert batch.nodes.shape == (1, 2, len(beginnings))
    tokens = sum(len(text) + 2 for text in texts)
    assert shared_tokens(ids, END) == tokens - len(beginnings)


def test_tree_equals_manual_example():
    (batch,) = trees(padded([(3, 5), (3,), (1, 2), (3, 5)], 5), END)
    np.testing.assert_array_equal(
        batch.nodes,
        [[[START, 1, 2, END, 3, 5, END, END], [8, 4, 4, 4, 8, 7, 7, 8]]],
    )
    assert dict(zip(batch.texts.tolist(), batch.leaves.tolist(), strict=True)) == {
        2: 0,
        0: 1,
        3: 1,
        1: 2,
    }


def test_padding_nodes_are_isolated_and_not_leaves():
    """Also if the end-of-text token is 0."""
    texts = [(1, 2, 3), (1, 2, 4), (5,)]
    (batch,) = trees(padded(texts, 5, end=0), 0, nodes=7)
    first, second = batch.nodes
    assert first[0].tolist() == [START, 1, 2, 3, 0, 4, 0]
    assert second[0, :3].tolist() == [START, 5, 0]
    assert second[1].tolist() == [3, 3, 3, 4, 5, 6, 7]
    assert (second[0, 3:] != 0).all()
    assert len(leaves_of(batch.nodes, end=0)) == 3


def test_labels_in_templates_need_a_third_of_the_tokens():
    rng = np.random.default_rng(0)
    templates = [tuple(rng.integers(0, 3, rng.integers(3, 7))) for _ in range(20)]
    labels = [tuple(rng.integers(3, 7, rng.integers(1, 4))) for _ in range(50)]
    ids = padded([(*t, *label) for t in templates for label in labels], CONTEXT)
    found = list(trees(ids, END))
    nodes = sum(batch.nodes.shape[0] * batch.nodes.shape[2] for batch in found)
    assert 0.1 < nodes / (ids != PAD).sum() < 0.4
    assert max(batch.nodes.shape[2] for batch in found) <= NODES
    assert max(len(batch.nodes) for batch in found) <= ROWS


def test_no_texts_give_no_trees():
    assert list(trees(np.zeros((0, 5), np.int32), END)) == []


def test_text_without_end_of_text_token_is_rejected():
    ids = padded([(1,), (2,)], 4)
    ids[1, 2] = 1
    with pytest.raises(ValueError, match="expected every text to have the end-of-text token 9"):
        list(trees(ids, END))
