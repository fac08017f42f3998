"""State of a bulk job in its output directory.

The directory holds `manifest.json`, the list of shards `shards.jsonl` (one per line), and one
Parquet file per finished shard, which is written atomically.

This module does not know Ray, or how a shard is embedded (`serving.bulk.worker`).
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from serving.bulk.sources import Source, shards_of
from serving.bundles.bundle import Bundle
from serving.errors import InputError
from serving.util.files import check_directory, new_file, write_text
from serving.util.locks import locked
from serving.util.progress import Progress
from serving.util.typed_json import from_json, json_text, parse_json

MANIFEST = "manifest.json"
PLAN = "shards.jsonl"
JOB_FORMAT = 1
_LOCK = ".lock"
_MAX_ROWS, _MIN_ROWS = 4096, 64
_SHARDS_PER_WORKER = 16
"""Minimum, if there are enough images, so that the job does not wait long for its last worker."""
_SHOWN_ERRORS = 5


def shard_path(output: Path, index: int) -> Path:
    """Return the file of a shard."""
    return output / f"shard-{index:05}.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkManifest:
    """Contents of `manifest.json`: the source, the model and the shards of a job."""

    format: int
    source: Source
    shard_size: int
    """Maximum number of rows per shard; see `shards_of`."""
    shards: int
    plan_sha256: str
    model: str
    weights_sha256: str
    embed_dim: int
    runner: str


@contextmanager
def output_locked(output: Path) -> Iterator[None]:
    """Create `output`, lock it for one job, and delete unfinished files of crashed workers.

    Raises:
        InputError: `output` holds other files, or another job is writing to it.
    """
    check_directory(output)
    held = {path.name for path in output.iterdir()} if output.exists() else set()
    others = sorted(held - {PLAN, _LOCK, f".{PLAN}.tmp", f".{MANIFEST}.tmp"})
    if others and MANIFEST not in held:
        raise InputError(
            f"{output} holds other files, such as {others[0]}, and no {MANIFEST} of a bulk job",
            advice="give a new or empty directory",
        )
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(output / _LOCK))
        except BlockingIOError as error:
            raise InputError(
                f"another job is writing to {output}", advice="wait for it, or stop it"
            ) from error
        _clear(output)
        yield
        _clear(output)


def _clear(output: Path) -> None:
    for leftover in output.glob(".shard-*"):
        leftover.unlink(missing_ok=True)


def begun_job(
    output: Path, source: Source, bundle: Bundle, runner: str, shard_size: int | None
) -> BulkManifest | None:
    """Return the manifest in `output` if a job was begun there, else None.

    Raises:
        InputError: the manifest is invalid or belongs to another job.
    """
    file = output / MANIFEST
    if not file.exists():
        return None
    try:
        begun = from_json(BulkManifest, parse_json(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} is not the manifest of a bulk job ({error})",
            advice="give a new or empty directory",
        ) from error
    facts = bundle.manifest
    expected: list[tuple[str, Any, Any]] = [
        ("format", begun.format, JOB_FORMAT),
        ("source", begun.source.location, source.location),
        ("image column", begun.source.image_column, source.image_column),
        ("path column", begun.source.path_column, source.path_column),
        ("shard size", begun.shard_size, shard_size or begun.shard_size),
        ("model", begun.model, facts.name),
        ("sha256 of weights", begun.weights_sha256, facts.provenance.weights_sha256),
        ("runner", begun.runner, begun.runner if runner == "auto" else runner),
    ]
    differing = [f"its {fact} is {old}, not {new}" for fact, old, new in expected if old != new]
    if differing:
        raise InputError(
            f"{output} belongs to another job: {'; '.join(differing)}",
            advice="give another --output, or delete this one",
        )
    return begun


def plan_job(
    output: Path, source: Source, bundle: Bundle, runner: str, size: int, progress: Progress
) -> BulkManifest:
    """Write the list of shards and the manifest of a new job."""
    progress("dividing the source into shards")
    with new_file(output / PLAN) as file:
        shards, digest = _write_plan(source, size, file)
    manifest = BulkManifest(
        format=JOB_FORMAT,
        source=source,
        shard_size=size,
        shards=shards,
        plan_sha256=digest,
        model=bundle.manifest.name,
        weights_sha256=bundle.manifest.provenance.weights_sha256,
        embed_dim=bundle.manifest.embed_dim,
        runner=runner,
    )
    write_text(output / MANIFEST, json_text(manifest, indent=2) + "\n")
    return manifest


def _write_plan(source: Source, size: int, file: BinaryIO | None = None) -> tuple[int, str]:
    """Write the list of shards to `file`, if given; return their number and the sha256."""
    count, digest = 0, hashlib.sha256()
    for count, shard in enumerate(shards_of(source, size), 1):  # noqa: B007
        line = (json_text(shard) + "\n").encode("ascii")
        digest.update(line)
        if file is not None:
            file.write(line)
    return count, digest.hexdigest()


def source_changed(begun: BulkManifest) -> bool:
    """Return whether the source would now be divided into other shards."""
    return _write_plan(begun.source, begun.shard_size) != (begun.shards, begun.plan_sha256)


def pending_shards(output: Path) -> list[dict[str, int]]:
    """Return number (`shard`) and byte offset in `PLAN` (`offset`) of each unfinished shard."""
    pending, offset = [], 0
    with (output / PLAN).open("rb") as plan:
        for index, line in enumerate(plan):
            if not _is_complete(shard_path(output, index)):
                pending.append({"shard": index, "offset": offset})
            offset += len(line)
    return pending


def _is_complete(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:  # pyarrow takes only paths in UTF-8
            return bool(pq.read_metadata(file).num_columns)
    except (OSError, pa.ArrowException):
        return False


def shard_size_for(rows: int, workers: int) -> int:
    """Return the default maximum number of rows per shard."""
    return min(_MAX_ROWS, max(_MIN_ROWS, rows // (workers * _SHARDS_PER_WORKER)))


def read_back(output: Path, shards: int) -> tuple[int, int, tuple[tuple[str, str], ...]]:
    """Return the number of rows and of errors in the shards, and the first few errors."""
    import pyarrow.parquet as pq

    rows = errors = 0
    first: list[tuple[str, str]] = []
    for index in range(shards):
        path = shard_path(output, index)
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            rows += file.metadata.num_rows
            bad = int((file.metadata.metadata or {}).get(b"errors", b"0"))
        if bad and len(first) < _SHOWN_ERRORS:
            with path.open("rb") as opened:
                table = pq.read_table(
                    opened, columns=["path", "error"], filters=[("status", "==", "error")]
                )
            first += [(row["path"], row["error"]) for row in table.to_pylist()]
        errors += bad
    return rows, errors, tuple(first[:_SHOWN_ERRORS])
