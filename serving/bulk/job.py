"""Bulk embedding on Ray Data: any number of pictures -> Parquet shards, by a pool of workers.

    outcome = bulk_embed("photos/", Path("embeddings"), Path("artifacts/clip"))

The source is cut into shards, the same way every time; a Ray Data pool of actors, each with a
runner of its own, embeds them. Only numbers of shards go through Ray: pictures are read, decoded
and embedded, and embeddings written, in the worker (`bulk_worker`). A shard's file appears whole or
not at all, so that what is there is done: by that a restarted job goes on where it was, and a shard
whose worker died is embedded again by another.

`output` holds `manifest.json`, `shards.jsonl` (the plan) and `shard-*.parquet`: `path` string,
`embedding` float32 [dim] of unit length, `status` "ok" or "error", `error` string.
"""

import functools
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from serving.bulk.plan import (
    begun_job,
    output_locked,
    pending_shards,
    plan_job,
    read_back,
    shard_size_for,
    source_changed,
)
from serving.bulk.ray_pool import (
    Resources,
    chosen_runner,
    connected,
    crew_of,
    embed_shards,
    run_on_cluster,
)
from serving.bulk.sources import find_source
from serving.bulk.worker import Job
from serving.bundles.bundle import Bundle
from serving.errors import InputError, RunnerError
from serving.runners.registry import missing
from serving.runners.spec import graph_of, known, runtime_of
from serving.util.progress import Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkResult:
    """What is in the output after a job, and how fast this job was."""

    output: str
    rows: int
    ok: int
    errors: int
    first_errors: tuple[tuple[str, str], ...]
    """Name and reason."""
    shards: int
    skipped_shards: int
    """That were there before this job."""
    source_changed: bool
    """Whether pictures came or went since the job was planned; the plan stands."""
    runner: str
    workers: int
    threads: int
    embedded_rows: int
    """By this job."""
    start_s: float
    """Until the first worker was ready: Ray's start, models loaded."""
    seconds: float
    """From then on."""

    rows_per_s: float
    """Of this job, once a worker was ready."""


def bulk_embed(
    source: str,
    output: Path,
    bundle: Path,
    *,
    runner: str = "auto",
    resources: Resources | None = None,
    shard_size: int | None = None,
    batch_size: int = 32,
    image_column: str | None = None,
    path_column: str | None = None,
    progress: Progress = silent,
) -> BulkResult:
    """Embed all pictures of `source` into Parquet shards in `output`, or go on with that.

    On a cluster, every node needs this package, and `source`, `output` and `bundle` at the same
    paths.
    By `ray://` all of it happens on the cluster: this machine needs none of them.

    Args:
        source: a folder, a file, or a pattern (`serving.bulk.sources.find_source`).
        output: a new or empty folder, or one of a job of the same source, model and runner.
        bundle: a directory that `clip-deploy export` made.
        runner: see `serving.runners.spec`; `auto`: the fastest on a worker, of those
            that passed the gate; in a restarted job the one it began with.
        shard_size: rows a shard at most; default: up to 4,096, fewer where that would leave workers
            without work.
        batch_size: pictures a run.
        image_column: of Parquet; default `image` or `bytes`.
        path_column: of Parquet, names the rows; default: the struct's own `path`, or file and row.

    Raises:
        InputError: there is nothing to embed, or `output` holds something else.
        BundleError: no bundle, or one that cannot be run.
        RunnerError: a worker cannot run it, or died again and again.
        ServerError: no Ray cluster at the address.
    """
    resources = resources or Resources()
    if resources.address and resources.address.startswith("ray://"):
        there = functools.partial(
            bulk_embed,
            os.path.abspath(source),  # noqa: PTH100  a pattern is no path
            output.absolute(),
            bundle.absolute(),
            runner=runner,
            resources=replace(resources, address="auto"),
            shard_size=shard_size,
            batch_size=batch_size,
            image_column=image_column,
            path_column=path_column,
        )
        return run_on_cluster(resources.address, there, progress)
    opened = Bundle.open(bundle.absolute())
    found, rows = find_source(source, image_column, path_column)
    output = output.absolute()
    if found.recursive and output.is_relative_to(found.root):
        raise InputError(
            f"--output {output} is inside of SOURCE, {found.root}", advice="give a folder outside"
        )
    if runner != "auto":
        _check_runner(opened, runner, here=resources.address is None)
    started = time.time()
    with output_locked(output):
        begun = begun_job(output, found, opened, runner, shard_size)
        if begun is not None:
            progress("comparing the source with the plan")
        changed = begun is not None and source_changed(output, begun)
        pending = pending_shards(output) if begun else None
        crew, embedded, ready = None, 0, 0.0
        if pending != []:
            with connected(resources.address, progress):
                crew = crew_of(begun.runner if begun else runner, resources)
                if begun is None or pending is None:
                    chosen = chosen_runner(runner, opened.path, crew, progress)
                    crew = crew_of(chosen, resources)
                    size = shard_size or shard_size_for(rows, crew.workers)
                    begun = plan_job(output, found, opened, chosen, size, progress)
                    pending = pending_shards(output)
                job = Job(
                    source=begun.source,
                    output=output,
                    bundle=opened.path,
                    runner=begun.runner,
                    threads=crew.threads,
                    batch_size=batch_size,
                )
                embedded, ready = embed_shards(job, pending, begun.shards, crew, progress)
        assert begun is not None
        finished = time.time()
        ready = ready or finished
        total, errors, first = read_back(output, begun.shards)
    return BulkResult(
        output=str(output),
        rows=total,
        ok=total - errors,
        errors=errors,
        first_errors=first,
        shards=begun.shards,
        skipped_shards=begun.shards - len(pending),
        source_changed=changed,
        runner=begun.runner,
        workers=crew.workers if crew else 0,
        threads=crew.threads if crew else 0,
        embedded_rows=embedded,
        start_s=ready - started,
        seconds=finished - ready,
        rows_per_s=embedded / (finished - ready) if embedded else 0.0,
    )


def _check_runner(bundle: Bundle, runner: str, *, here: bool) -> None:
    """Refuse early what no worker could run."""
    spec = known(runner)
    precision, library = graph_of(spec), runtime_of(spec).library
    if library is None:
        bundle.artifact("image", precision)
    else:
        bundle.plans("image", precision, library)
    if here and (error := missing(spec)) is not None:
        raise RunnerError(f"{runner}: {error.reason}", advice=error.advice)
