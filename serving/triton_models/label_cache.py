"""Label sets embedded once and kept: what makes zero-shot classification cheap on a server.

`LabelSetCache` is a least-recently-used cache bounded in bytes. A set that is not in it is embedded
a chunk at a time by one thread, which takes the sets under way in turn: a small set does not wait
for a large one to end, requests for the same set share the work, and a set that nobody waits for
any more is dropped after the chunk in hand.

Knows nothing of Triton; `model_repository/clip_zero_shot` gives it the texts and the tower.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.errors import TextError
from serving.inputs.labels import LabelSet
from serving.inputs.tokenizer import Tokenizer, batches_by_beginning, batches_by_length
from serving.tasks.embedder import Floats
from serving.tasks.zero_shot import ClassEmbeddings

_TOKENIZED = 1024  # texts tokenized at a time, about as long as a tower takes for a chunk

Work = Generator[None, None, Floats]
"""Embeds a set, pausing after every chunk; returns float32 [labels, dim]."""


class Waiter(Protocol):
    """Somebody who waits for a set. Called from the cache's thread; must not raise or linger."""

    def wanted(self) -> bool:
        """Whether the answer still has somebody to go to."""

    def ready(self, embeddings: Floats) -> None:
        """The set is embedded."""

    def failed(self, error: Exception) -> None:
        """It will not be: the error of its work, or `Abandoned`."""


class Abandoned(Exception):  # noqa: N818  nothing went wrong
    """Nobody who waits for the set wants it any more."""


class Full(Exception):  # noqa: N818  nothing went wrong
    """Too much waits already; it says what."""


@dataclass(slots=True)
class _Job:
    work: Work
    texts: int
    waiters: list[Waiter] = field(default_factory=list)


class LabelSetCache:
    """Embeddings of label sets by key; use `close` at the end.

    Args:
        max_bytes: of all embeddings together; a set larger than that is embedded and not kept.
        max_texts: of all sets under way together; a set larger than that is embedded alone.
        max_waiters: of all sets together.
    """

    def __init__(self, max_bytes: int, *, max_texts: int, max_waiters: int) -> None:
        self._max_bytes, self._max_texts = max_bytes, max_texts
        self._max_waiters = max_waiters
        self._kept: OrderedDict[bytes, Floats] = OrderedDict()
        self._jobs: dict[bytes, _Job] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="label-sets", daemon=True)
        self._thread.start()

    def ask(
        self, key: bytes, start: Callable[[], Work], texts: int, waiter: Waiter
    ) -> Floats | None:
        """The embeddings of a set that is kept; else None, and `waiter` is told when there are.

        Args:
            key: see `key_of`.
            start: makes the work, if nobody has begun it.
            texts: of the set.
            waiter: told exactly once, if the set is not kept.

        Raises:
            Full: nothing was begun, and the waiter will not be told.
        """
        with self._changed:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            waiters = sum(len(job.waiters) for job in self._jobs.values())
            if waiters >= self._max_waiters:
                raise Full(f"{waiters} requests wait for their labels to be embedded")
            if key not in self._jobs:
                under_way = sum(job.texts for job in self._jobs.values())
                if under_way and under_way + texts > self._max_texts:
                    raise Full(f"{under_way} texts of labels wait to be embedded")
                self._jobs[key] = _Job(start(), texts)
            self._jobs[key].waiters.append(waiter)
            self._changed.notify()
            return None

    def close(self) -> None:
        """Drop all work; those who wait are told."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                turn = list(self._jobs.items())
                if self._closed:
                    break
            for key, job in turn:
                self._advance(key, job)
        for _, job in turn:
            _fail(job.waiters, Abandoned())

    def _advance(self, key: bytes, job: _Job) -> None:
        """One chunk of a set; none of a set that nobody wants."""
        with self._changed:
            waiters = list(job.waiters)
        if not any(waiter.wanted() for waiter in waiters):
            with self._changed:
                if len(job.waiters) > len(waiters):  # who has joined meanwhile may want it
                    return
                del self._jobs[key]
            job.work.close()
            _fail(waiters, Abandoned())
            return
        try:
            next(job.work)
        except StopIteration as end:
            embeddings: Floats = end.value
            with self._changed:
                del self._jobs[key]
                self._keep(key, embeddings)
            for waiter in job.waiters:
                waiter.ready(embeddings)
        except Exception as error:  # this thread goes on for the others
            with self._changed:
                del self._jobs[key]
            _fail(job.waiters, error)

    def _keep(self, key: bytes, embeddings: Floats) -> None:
        self._kept[key] = embeddings
        while self._kept and sum(kept.nbytes for kept in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)


def _fail(waiters: list[Waiter], error: Exception) -> None:
    for waiter in waiters:
        waiter.failed(error)


def key_of(model: str, labels: LabelSet) -> bytes:
    """What a set is kept under: the model, the labels and the templates, each in order."""
    digest = hashlib.sha256()
    for part in (model, str(len(labels.labels)), *labels.labels, *labels.templates):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def embedding_work(
    labels: LabelSet,
    tokenizer: Tokenizer,
    embed: Callable[[NDArray[np.int32]], Floats | None],
    chunk: int,
    *,
    trees: bool = False,
) -> Work:
    """Embed a set by `embed`, which takes `input_ids` int32 [up to chunk, a bucket].

    With `trees`, texts come in batches that begin alike, else in batches of like length. Where
    `embed` returns None, since its tower is busy with others, the same is asked again later.

    Raises:
        TextError: a text cannot be tokenized or is too long; the message says which label.
    """
    rows: list[list[int]] = []
    for start in range(0, len(labels), _TOKENIZED):
        try:
            rows += tokenizer.encode(labels.texts(start, start + _TOKENIZED))
        except TextError as error:
            raise labels.blamed(error, range(start, len(labels))) from error
        yield
    classes = ClassEmbeddings(len(labels.labels), len(labels.templates))
    for batch in (batches_by_beginning if trees else batches_by_length)(rows, chunk):
        length = tokenizer.bucket(max(len(rows[index]) for index in batch))
        ids = tokenizer.padded([rows[index] for index in batch], length)
        while (embeddings := embed(ids)) is None:
            yield
        classes.add(batch, embeddings)
        yield
    return classes.unit()
