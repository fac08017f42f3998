"""The cache of label sets: contents, shared work, eviction, and order of the work."""

import threading
import time

import numpy as np
import pytest

from serving.errors import TextError
from serving.inputs.labels import LabelSet
from serving.inputs.tokenizer import Tokenizer
from serving.triton_models.label_cache import Abandoned, Full, LabelSetCache, embedding_work, key_of

ROW = 4 * 8  # bytes of one label of 8 dimensions


class Asker:
    """A waiter that records its answers."""

    def __init__(self):
        self.here, self.told, self.answers = True, threading.Event(), []

    def wanted(self):
        return self.here

    def ready(self, embeddings):
        self.answers.append(embeddings)
        self.told.set()

    def failed(self, error):
        self.answers.append(error)
        self.told.set()

    def answer(self):
        assert self.told.wait(10)
        return self.answers[0]


class Tower:
    """Works on sets chunk by chunk, waits for permission before each, and records the work."""

    def __init__(self):
        self.done, self.let = [], threading.Semaphore(0)

    def work(self, name, chunks, rows=1, error=None):
        try:
            for chunk in range(chunks):
                assert self.let.acquire(timeout=10)
                if error is not None:
                    raise error
                self.done.append((name, chunk))
                yield
        except GeneratorExit:
            self.done.append((name, "dropped"))
            raise
        return np.full((rows, 8), ord(name), np.float32)


@pytest.fixture
def tower():
    return Tower()


@pytest.fixture
def cache():
    opened = LabelSetCache(4 * ROW, max_texts=100, max_waiters=8)
    yield opened
    opened.close()
    assert not opened._thread.is_alive()


def ask(cache, tower, name, chunks, **options):
    asker = Asker()
    kept = cache.ask(name.encode(), lambda: tower.work(name, chunks, **options), chunks, asker)
    return asker if kept is None else kept


def embed(cache, tower, name, rows):
    asker = ask(cache, tower, name, 1, rows=rows)
    tower.let.release(1)
    return asker.answer()


def test_equal_requests_share_the_work(cache, tower):
    askers = [ask(cache, tower, "a", 3) for _ in range(5)]
    tower.let.release(3)
    answers = [asker.answer() for asker in askers]
    assert tower.done == [("a", 0), ("a", 1), ("a", 2)]
    assert all(answer is answers[0] for answer in answers)
    assert ask(cache, tower, "a", 3) is answers[0]
    assert all(len(asker.answers) == 1 for asker in askers)


def test_label_sets_are_processed_alternately(cache, tower):
    """A small set that arrives later is finished before a large one."""
    large = ask(cache, tower, "l", 40)
    tower.let.release(2)
    while len(tower.done) < 2:
        time.sleep(0.001)
    small = ask(cache, tower, "s", 2)
    tower.let.release(40)
    small.answer()
    large.answer()
    places = [index for index, (name, _) in enumerate(tower.done) if name == "s"]
    assert places[-1] < 10


def test_least_recently_used_set_is_evicted(cache, tower):
    a, b = embed(cache, tower, "a", 2), embed(cache, tower, "b", 2)
    assert ask(cache, tower, "a", 1) is a
    embed(cache, tower, "c", 1)  # five rows: b, used before a, is evicted
    assert ask(cache, tower, "a", 1) is a
    assert isinstance(ask(cache, tower, "c", 1), np.ndarray)
    again = embed(cache, tower, "b", 2)
    assert again is not b
    np.testing.assert_array_equal(again, b)


def test_set_larger_than_the_cache_is_answered_but_not_kept(cache, tower):
    assert embed(cache, tower, "x", 5).shape == (5, 8)
    assert embed(cache, tower, "x", 5).shape == (5, 8)
    assert tower.done == [("x", 0)] * 2


def test_abandoned_work_is_dropped(cache, tower):
    one, other = ask(cache, tower, "a", 50), ask(cache, tower, "a", 50)
    tower.let.release(3)
    one.here = False  # the other request still waits
    while len(tower.done) < 3:
        time.sleep(0.001)
    assert not one.told.is_set()
    other.here = False
    tower.let.release(1)
    assert isinstance(one.answer(), Abandoned)
    assert isinstance(other.answer(), Abandoned)
    assert tower.done[-1] == ("a", "dropped")
    assert len(tower.done) <= 6
    # A later request starts again.
    later = ask(cache, tower, "a", 2)
    tower.let.release(10)
    assert later.answer().shape == (1, 8)


def test_error_is_sent_to_its_waiters_and_not_cached(cache, tower):
    good = ask(cache, tower, "g", 3)
    bad = [ask(cache, tower, "b", 1, error=TextError("no")) for _ in range(2)]
    tower.let.release(10)
    assert all(isinstance(asker.answer(), TextError) for asker in bad)
    assert good.answer().shape == (1, 8)
    assert isinstance(ask(cache, tower, "b", 1).answer(), np.ndarray)


def test_excess_requests_are_rejected_without_work(cache, tower):
    """The limits are 100 texts and 8 waiters. A set above the limit is accepted if it is alone."""
    large = ask(cache, tower, "l", 120)
    with pytest.raises(Full, match="120 label texts wait"):
        ask(cache, tower, "s", 1)
    others = [ask(cache, tower, "l", 120) for _ in range(7)]
    with pytest.raises(Full, match="8 requests wait"):
        ask(cache, tower, "l", 120)
    tower.let.release(120)
    assert {id(asker.answer()) for asker in (large, *others)} == {id(large.answer())}
    assert {name for name, _ in tower.done} == {"l"}
    sets = [ask(cache, tower, name, 50) for name in "ab"]
    with pytest.raises(Full, match="100 label texts"):
        ask(cache, tower, "c", 1)
    tower.let.release(100)
    for asker in sets:
        asker.answer()
    tower.let.release(1)
    assert isinstance(ask(cache, tower, "c", 1).answer(), np.ndarray)


def test_closing_answers_all_waiters(tower):
    cache = LabelSetCache(ROW, max_texts=100, max_waiters=8)
    asker = ask(cache, tower, "a", 50)
    tower.let.release(1)
    while not tower.done:
        time.sleep(0.001)
    closing = threading.Thread(target=cache.close)
    closing.start()
    tower.let.release(1)
    closing.join(10)
    assert isinstance(asker.answer(), Abandoned)


def test_different_label_sets_have_different_keys():
    sets = [
        LabelSet(("a", "b"), ("{}",)),
        LabelSet(("b", "a"), ("{}",)),
        LabelSet(("a",), ("b{}", "{}")),
        LabelSet(("a",), ("{}", "b{}")),
        LabelSet(("ab",), ("{}",)),
        LabelSet(("a", "b{}"), ("{}",)),
        LabelSet(("a",), ("b{}{}",)),
    ]
    keys = [key_of(model, labels) for model in ("one", "two") for labels in sets]
    assert len(set(keys)) == len(keys)
    assert key_of("one", LabelSet(("a", "b"), ("{}",))) == keys[0]


def test_batch_is_sent_again_to_a_busy_tower(tiny_bundle):
    tokenizer = Tokenizer(tiny_bundle.tokenizer, tiny_bundle.manifest.text)
    labels = LabelSet(("cat", "dog", "a bird that sings all the day long in a tree"), ("{}",))
    asked = []

    def embed(ids):
        asked.append(ids)
        return None if len(asked) % 3 else np.ones((len(ids), 8), np.float32)

    pauses, found = 0, []

    def finished():
        found.append((yield from embedding_work(labels, tokenizer, embed, 2)))

    for _ in finished():
        pauses += 1
    assert [ids.shape for ids in asked] == [(2, 8)] * 3 + [(1, 16)] * 3
    assert pauses == 1 + 2 * 3
    np.testing.assert_allclose(found[0], np.full((3, 8), 8**-0.5), rtol=1e-6)


def test_prefix_tree_batches_have_shared_prefixes(tiny_bundle):
    tokenizer = Tokenizer(tiny_bundle.tokenizer, tiny_bundle.manifest.text)
    labels = LabelSet(tuple("abcdefg"), ("{} photo", "the {}", "one long template before {}"))
    asked = []

    def embed(ids):
        asked.append(ids)
        return np.random.default_rng(0).normal(size=(49408, 8))[ids[:, 1:6]].sum(axis=1)

    found = []

    def finished():
        found.append((yield from embedding_work(labels, tokenizer, embed, 10, trees=True)))

    pauses = len(list(finished()))
    assert pauses == 1 + 3
    rows = [tuple(row) for ids in asked for row in ids]
    assert [len(ids) for ids in asked] == [10, 10, 1]
    assert rows == sorted(rows)
    means = embed(tokenizer(labels.texts())).reshape(7, 3, 8).mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(found[0], means, atol=1e-6)


def test_batches_are_sorted_by_length_and_limited_to_the_chunk(tiny_bundle):
    """Every text occurs once, in batches of at most `chunk`, sorted by length. The averages are
    correct."""
    tokenizer = Tokenizer(tiny_bundle.tokenizer, tiny_bundle.manifest.text)
    labels = LabelSet(
        tuple(f"{'very ' * (index % 20)}thing {index}" for index in range(50)),
        ("{}", "a photo of {}", "two {}"),
    )
    asked = []

    def embed(ids):
        asked.append(ids)
        rows = np.random.default_rng(0).normal(size=(49408, 8))[ids[:, 1:6]].sum(axis=1)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    work = embedding_work(labels, tokenizer, embed, 16)
    while True:
        try:
            next(work)
        except StopIteration as end:
            found = end.value
            break
    assert all(len(ids) <= 16 for ids in asked)
    assert sum(map(len, asked)) == 150
    lengths = [ids.shape[1] for ids in asked]
    assert lengths == sorted(lengths)
    assert set(lengths) == {8, 16, 24, 32}
    each = [embed(tokenizer([text]))[0] for text in labels.texts()]
    means = np.array(each).reshape(50, 3, 8).mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(found, means, atol=1e-6)
