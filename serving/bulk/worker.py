"""Worker of a bulk job, which embeds the images of a shard and writes its Parquet file.

The file is written atomically, so any worker may retry a shard any number of times. Pixels and
embeddings are not passed between processes.

This module does not know how shards are distributed (`serving.bulk.ray_pool`).
"""

import time
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
from serving.errors import BundleError, ClipDeployError, InputError, RunnerError, worded
from serving.inputs.preprocess import preprocess
from serving.runners.autotune import fastest
from serving.runners.registry import open_runner
from serving.util.files import new_file
from serving.util.typed_json import from_json, parse_json

_AHEAD = 1
"""Number of batches to decode in advance, while another batch is embedded."""
_ROW_GROUP = 1024
"""Minimum number of rows in a row group of the output, except the last. A worker keeps one row
group in memory, so its memory does not grow with the size of a shard."""

Decoded = NDArray[np.uint8] | str
"""Pixels, or the reason of an error."""
Batch = tuple[list[str], list[Decoded]]
"""Names of images, and their pixels or errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Parameters that all workers of a job share."""

    source: Source
    output: Path
    bundle: Path
    runner: str
    threads: int
    batch_size: int


def schema(dim: int) -> Any:
    """Return the `pyarrow.Schema` of the output.

    The embedding of a row with an error is zeros, not null: up to PyArrow 25, fixed-size lists with
    a null can be written to Parquet but not read (github.com/apache/arrow/issues/35692).
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
    """Return the name of the fastest runner of the image tower on `threads` CPUs.

    Only runners that passed the parity gate are timed. This process is restricted to these CPUs.

    Raises:
        BundleError: none of them is available on this machine.
    """
    keep_to_cpus(threads)
    opened = Bundle.open(bundle)
    return str(fastest(opened, "image"))


class Worker:
    """Ray actor that embeds shards.

    A failure that affects every shard, such as a missing runner or a full disk, is returned as a
    result and not raised, because Ray would retry the shard after an exception.
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
        """Embed shards.

        Args:
            batch: `shard`, the number of each shard, and `offset`, the byte offset of its line in
                `PLAN`; both int64 [n].

        Returns:
            Lists with one item per shard: `shard`, its number; `rows`, the number of rows written;
            `failure`, the reason why it was not written, or ""; and `ready`, the time when this
            worker was ready, in seconds since 1970.
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
        attempts = Attempts(target)
        rows = read_shard(self._job.source, shard)
        if attempts.careful:
            batches = self._decoded(attempts.watched(rows), 1, ahead=0)
        else:
            batches = self._decoded(rows, self._job.batch_size)
        with new_file(target) as file:
            count = self._write(file, batches)
        attempts.done()
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
        """Yield decoded batches while up to `ahead` more are being decoded."""
        submitted: deque[tuple[list[str], list[Future[Decoded]]]] = deque()
        remaining = iter(rows)
        while batch := list(islice(remaining, size)):
            names = [name for name, _ in batch]
            submitted.append((names, [self._pool.submit(self._pixels, item) for _, item in batch]))
            if len(submitted) > ahead:
                yield _finished(*submitted.popleft())
        while submitted:
            yield _finished(*submitted.popleft())

    def _pixels(self, image: Path | bytes | InputError) -> Decoded:
        if isinstance(image, InputError):
            return worded(image.reason, image.advice)
        try:
            return preprocess(image, self._spec)
        except InputError as error:
            return worded(error.reason, error.advice)
        except Exception as error:  # a decoder error must not fail the other images
            return f"{type(error).__name__}: {error}"


def _finished(names: list[str], futures: list[Future[Decoded]]) -> Batch:
    return names, [future.result() for future in futures]


def _shard_at(plan: Path, offset: int) -> Shard:
    with plan.open("rb") as file:
        file.seek(offset)
        return from_json(Shard, parse_json(file.readline()))
