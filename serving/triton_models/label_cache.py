"""Cache of the embeddings of label sets, so that a server embeds each set once.

`LabelSetCache` is a least-recently-used cache with a size limit in bytes. One thread embeds the
missing sets in round-robin order, one chunk at a time, so that a small set does not wait for a
large one to complete. Requests for the same set share the work. A set is dropped after the current
chunk if no request waits for it any more.

This module does not depend on Triton; `serving.triton_models.zero_shot` passes it the label set and
a function that runs the tower.
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

_TOKENIZED = 1024  # texts tokenized at a time; takes about as long as embedding a chunk

Work = Generator[None, None, Floats]
"""Generator that embeds a set and yields after each chunk; returns float32 [labels, dim]."""


class Waiter(Protocol):
    """Request that waits for a set. Called from the cache's thread; must not raise or block."""

    def wanted(self) -> bool:
        """Return whether the request still needs an answer."""

    def ready(self, embeddings: Floats) -> None:
        """Receive the embeddings of the set."""

    def failed(self, error: Exception) -> None:
        """Receive the error of the work, or `Abandoned`."""


class Abandoned(Exception):  # noqa: N818  not an error
    """The work on a set was dropped because no request needs it any more."""


class Full(Exception):  # noqa: N818  not an error
    """Too many requests or too many texts are waiting; the message says which."""


@dataclass(slots=True)
class _Job:
    work: Work
    texts: int
    waiters: list[Waiter] = field(default_factory=list)


class LabelSetCache:
    """Embeddings of label sets by key. Call `close` at the end.

    Args:
        max_bytes: maximum total size of the cached embeddings. A larger set is embedded but not
            cached.
        max_texts: maximum total number of texts in the sets in progress. A larger set is accepted
            only if no other set is in progress.
        max_waiters: maximum number of waiting requests of all sets.
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
        """Return the embeddings of a cached set; else return None and notify `waiter` later.

        Args:
            key: key of the set; see `key_of`.
            start: creates the work if the set is not in progress yet.
            texts: number of texts in the set.
            waiter: notified exactly once if the set is not cached.

        Raises:
            Full: a limit of the cache is reached. The waiter will not be notified.
        """
        with self._changed:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            waiters = sum(len(job.waiters) for job in self._jobs.values())
            if waiters >= self._max_waiters:
                raise Full(f"{waiters} requests wait for the embeddings of their labels")
            if key not in self._jobs:
                in_progress = sum(job.texts for job in self._jobs.values())
                if in_progress and in_progress + texts > self._max_texts:
                    raise Full(f"{in_progress} label texts wait to be embedded")
                self._jobs[key] = _Job(start(), texts)
            self._jobs[key].waiters.append(waiter)
            self._changed.notify()
            return None

    def close(self) -> None:
        """Drop all work and notify the waiters."""
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
        """Embed one chunk of a set, or drop the set if no waiter wants it."""
        with self._changed:
            waiters = list(job.waiters)
        if not any(waiter.wanted() for waiter in waiters):
            with self._changed:
                if len(job.waiters) > len(waiters):  # a waiter that joined meanwhile may want it
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
        except Exception as error:  # the thread continues with the other sets
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
    """Return the cache key of a set: a digest of the model, the labels and the templates."""
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
    """Embed a label set, yielding after each chunk.

    Args:
        labels: the set.
        tokenizer: tokenizer of the model.
        embed: embeds `input_ids`, int32 [up to `chunk`, length of a bucket]. It returns None if the
            tower is busy; the batch is then tried again later.
        chunk: maximum number of texts in a batch.
        trees: batch texts that share prefixes, instead of texts of similar length.

    Raises:
        TextError: a text cannot be tokenized or is too long; the message names the label.
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
