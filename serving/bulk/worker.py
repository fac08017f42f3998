"""One worker of a bulk job: it decodes and embeds the pictures of a shard, and writes its file.

A shard's file appears whole or not at all, so a shard may be tried any number of times, by any
worker. Pixels and embeddings never leave the process that made them.

Does not know: who hands out the shards (`bulk`).
"""

import json
import os
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.bulk.isolation import Attempts, keep_to_cpus
from serving.bulk.plan import PLAN, shard_path
from serving.bulk.sources import Row, Shard, Source, read_shard
from serving.bundles.bundle import Bundle
from serving.errors import BundleError, ClipDeployError, InputError, RunnerError
from serving.inputs.preprocess import preprocess
from serving.runners.autotune import fastest
from serving.runners.registry import open_runner
from serving.util.typed_json import from_json

_AHEAD = 1
"""Batches that are being decoded while one is embedded."""
_ROW_GROUP = 1024
"""Rows of a row group of the output: bounds what a worker holds, whatever the size of a shard."""

Decoded = NDArray[np.uint8] | str
"""Pixels, or why there are none."""
Batch = tuple[list[str], list[Decoded]]
"""Names, and what became of their pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all workers of a job share."""

    source: Source
    output: Path
    bundle: Path
    runner: str
    threads: int
    batch_size: int


def schema(dim: int) -> Any:
    """The `pyarrow.Schema` of the output.

    The embedding of an error is zeros, not null: up to PyArrow 25, lists of fixed size that hold a
    null can be written to Parquet and not be read (github.com/apache/arrow/issues/35692).
    """
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), dim), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
        ]
    )


def fastest_runner(bundle: Path, threads: int) -> str:
    """The fastest runner of the image tower, of those that passed the gate, with `threads`.

    Raises:
        BundleError: none can run here.
    """
    keep_to_cpus(threads)
    opened = Bundle.open(bundle)
    return str(fastest(opened, "image"))


class Worker:
    """Embeds shards; Ray makes one an actor.

    A failure that would meet every shard (no such runner here, a full disk) is an answer, not an
    exception: Ray would try again.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._failure = ""
        self._claims = keep_to_cpus(job.threads)
        self._pool = ThreadPoolExecutor(job.threads, thread_name_prefix="decode")
        try:
            bundle = Bundle.open(job.bundle)
            self._spec, self._dim = bundle.manifest.image, bundle.manifest.embed_dim
            self._runner = open_runner(bundle, "image", job.runner).__enter__()
            size = self._spec.size
            self._runner.run(np.zeros((job.batch_size, 3, size, size), np.uint8))
        except (BundleError, RunnerError) as error:
            self._failure = str(error)
        self._ready = time.time()

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, list[Any]]:
        """Embed the shards of `batch`, `shard` and `offset` (of its line in the plan), int64 [n].

        Returns:
            For each its `shard`, its `rows`, `failure` ("" if none), and when this worker was
            `ready`, in seconds since 1970.
        """
        answers: dict[str, list[Any]] = {"shard": [], "rows": [], "failure": [], "ready": []}
        for index, offset in zip(batch["shard"].tolist(), batch["offset"].tolist(), strict=True):
            rows = 0
            if not self._failure:
                try:
                    rows = self._embed(index, offset)
                except (OSError, ClipDeployError) as error:
                    self._failure = f"shard {index}: {error}"
            for key, value in zip(answers, (index, rows, self._failure, self._ready), strict=True):
                answers[key].append(value)
        return answers

    def _embed(self, index: int, offset: int) -> int:
        target = shard_path(self._job.output, index)
        shard = _shard_at(self._job.output / PLAN, offset)
        temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}.tmp")
        attempts = Attempts(target)
        rows = read_shard(self._job.source, shard)
        if attempts.careful:
            batches = self._decoded(attempts.watched(rows), 1, ahead=0)
        else:
            batches = self._decoded(rows, self._job.batch_size)
        try:
            with temporary.open("wb") as file:
                count = self._write(file, batches)
                file.flush()
                os.fsync(file.fileno())  # or a power failure leaves an empty file of a good name
            temporary.replace(target)
            attempts.done()
        finally:
            temporary.unlink(missing_ok=True)
        return count

    def _write(self, file: Any, batches: Iterable[Batch]) -> int:
        import pyarrow as pa
        import pyarrow.parquet as pq

        count = errors = 0
        columns = schema(self._dim)
        with pq.ParquetWriter(file, columns, use_dictionary=["status"]) as writer:
            waiting: list[Any] = []
            for names, decoded in batches:
                waiting.append(self._table(names, decoded, columns))
                count += len(names)
                errors += sum(isinstance(item, str) for item in decoded)
                if sum(len(table) for table in waiting) >= _ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting.clear()
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
            writer.add_key_value_metadata({"errors": str(errors)})
        return count

    def _table(self, names: list[str], decoded: list[Decoded], columns: Any) -> Any:
        import pyarrow as pa

        pixels = [item for item in decoded if not isinstance(item, str)]
        bad = np.array([isinstance(item, str) for item in decoded])
        embeddings = np.zeros((len(decoded), self._dim), np.float32)
        if pixels:
            embeddings[~bad] = self._runner.run(np.stack(pixels))
        arrays = [
            pa.array(names, pa.string()),
            pa.FixedSizeListArray.from_arrays(
                pa.array(embeddings.reshape(-1)), type=columns.field("embedding").type
            ),
            pa.array(np.where(bad, "error", "ok").tolist(), pa.string()),
            pa.array([item if isinstance(item, str) else None for item in decoded], pa.string()),
        ]
        return pa.table(arrays, schema=columns)

    def _decoded(self, rows: Iterable[Row], size: int, ahead: int = _AHEAD) -> Iterator[Batch]:
        """Batches, with up to `ahead` more being decoded."""
        begun: deque[tuple[list[str], list[Future[Decoded]]]] = deque()
        remaining = iter(rows)
        while batch := list(islice(remaining, size)):
            names = [name for name, _ in batch]
            begun.append((names, [self._pool.submit(self._pixels, item) for _, item in batch]))
            if len(begun) > ahead:
                yield _finished(*begun.popleft())
        while begun:
            yield _finished(*begun.popleft())

    def _pixels(self, picture: Path | bytes | InputError) -> Decoded:
        if isinstance(picture, InputError):
            return picture.reason
        try:
            return preprocess(picture, self._spec)
        except InputError as error:
            return error.reason
        except Exception as error:  # whatever a decoder raises is that picture's, not the job's
            return f"{type(error).__name__}: {error}"


def _finished(names: list[str], futures: list[Future[Decoded]]) -> Batch:
    return names, [future.result() for future in futures]


def _shard_at(plan: Path, offset: int) -> Shard:
    with plan.open("rb") as file:
        file.seek(offset)
        return from_json(Shard, json.loads(file.readline()))
