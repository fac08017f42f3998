"""What a bulk job is to do, what of it is done, and whose the output folder is.

A job's folder holds `manifest.json`, the plan `shards.jsonl` (a shard a line) and a Parquet file a
shard, which appears whole or not at all: what is there is done.

Does not know: Ray, or how a shard is embedded (`bulk_worker`).
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serving.bulk.sources import Source, shards_of
from serving.bundles.bundle import Bundle
from serving.errors import InputError
from serving.util.files import sha256_of, write_text
from serving.util.locks import locked
from serving.util.progress import Progress
from serving.util.typed_json import from_json

MANIFEST = "manifest.json"
PLAN = "shards.jsonl"
JOB_FORMAT = 1
_NEW_PLAN = f".{PLAN}.tmp"
_LOCK = ".lock"
_MOST_ROWS, _FEWEST_ROWS = 4096, 64
_SHARDS_A_WORKER = 16
"""At least, where there are pictures enough: the last worker is then not waited for long."""
_SHOWN_ERRORS = 5


def shard_path(output: Path, index: int) -> Path:
    """The file of a shard."""
    return output / f"shard-{index:05}.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkManifest:
    """What a folder of shards holds, and by what it was made."""

    format: int
    source: Source
    shard_size: int
    """Rows a shard, at most (see `shards_of`)."""
    shards: int
    plan_sha256: str
    model: str
    weights_sha256: str
    embed_dim: int
    runner: str


@contextmanager
def output_locked(output: Path) -> Iterator[None]:
    """Make `output`, keep other jobs away, and clear away what killed workers left half written.

    Raises:
        InputError: it holds something else, or another job is writing to it.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; expected the name of a folder to write")
    held = {path.name for path in output.iterdir()} if output.exists() else set()
    others = sorted(held - {PLAN, _NEW_PLAN, _LOCK, f".{MANIFEST}.tmp"})
    if others and MANIFEST not in held:
        raise InputError(
            f"{output} holds other things, such as {others[0]}, and no {MANIFEST} of a bulk job; "
            "give a new or empty folder"
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
    """The manifest of the job that `output` belongs to, if it is this one; None if it is new.

    Raises:
        InputError: it is another.
    """
    file = output / MANIFEST
    if not file.exists():
        return None
    try:
        begun = from_json(BulkManifest, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} is not of a bulk job ({error}); give a new or empty folder"
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
    differing = [f"its {what} is {was}, not {now}" for what, was, now in expected if was != now]
    if differing:
        raise InputError(
            f"{output} was begun by another job: {'; '.join(differing)}; give another --output, "
            "or delete this one"
        )
    return begun


def plan_job(
    output: Path, source: Source, bundle: Bundle, runner: str, size: int, progress: Progress
) -> BulkManifest:
    """Write the plan and the manifest of a new job."""
    progress("cutting the source into shards")
    temporary = output / _NEW_PLAN
    shards, digest = _write_plan(temporary, source, size)
    temporary.replace(output / PLAN)
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
    write_text(output / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def _write_plan(path: Path, source: Source, size: int) -> tuple[int, str]:
    """Write the plan, a shard a line; the number of shards and the sha256 of it."""
    count = 0
    with path.open("w", encoding="ascii") as file:
        for count, shard in enumerate(shards_of(source, size), 1):  # noqa: B007
            file.write(json.dumps(asdict(shard)) + "\n")
    return count, sha256_of(path)


def source_changed(output: Path, begun: BulkManifest) -> bool:
    """Whether the source would be cut otherwise today."""
    temporary = output / _NEW_PLAN
    try:
        today = _write_plan(temporary, begun.source, begun.shard_size)
    finally:
        temporary.unlink(missing_ok=True)
    return today != (begun.shards, begun.plan_sha256)


def pending_shards(output: Path) -> list[dict[str, int]]:
    """`shard`, its number, and `offset`, its place in the plan, of each that is to be done."""
    pending, offset = [], 0
    with (output / PLAN).open("rb") as plan:
        for index, line in enumerate(plan):
            if not _whole(shard_path(output, index)):
                pending.append({"shard": index, "offset": offset})
            offset += len(line)
    return pending


def _whole(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return path.exists() and pq.read_metadata(path).num_columns > 0
    except (OSError, pa.ArrowException):
        return False


def shard_size_for(rows: int, workers: int) -> int:
    """Rows a shard, where the user does not say."""
    return min(_MOST_ROWS, max(_FEWEST_ROWS, rows // (workers * _SHARDS_A_WORKER)))


def read_back(output: Path, shards: int) -> tuple[int, int, tuple[tuple[str, str], ...]]:
    """Rows, errors and the first few of them, from the shards themselves."""
    import pyarrow.parquet as pq

    rows = errors = 0
    first: list[tuple[str, str]] = []
    for index in range(shards):
        path = shard_path(output, index)
        with pq.ParquetFile(path) as file:
            rows += file.metadata.num_rows
            bad = int((file.metadata.metadata or {}).get(b"errors", b"0"))
        if bad and len(first) < _SHOWN_ERRORS:
            table = pq.read_table(
                path, columns=["path", "error"], filters=[("status", "==", "error")]
            )
            first += [(row["path"], row["error"]) for row in table.to_pylist()]
        errors += bad
    return rows, errors, tuple(first[:_SHOWN_ERRORS])
