"""Bulk embedding with Ray Data: a pool of workers embeds any number of images to Parquet shards.

    outcome = bulk_embed("photos/", Path("embeddings"), Path("artifacts/clip"))

The source is divided into shards deterministically. A Ray Data pool of actors, each with its own
runner, embeds them. Only shard numbers pass through Ray: a worker (`serving.bulk.worker`) reads,
decodes and embeds the images and writes the embeddings. The file of a shard is written atomically,
so every existing file is complete. A restarted job therefore resumes where it stopped, and a shard
whose worker crashed is embedded again by another worker.

`output` holds `manifest.json`, `shards.jsonl` (the list of shards) and `shard-*.parquet` with the
columns `path` string, `embedding` float32 [dim] of unit length, `status` "ok" or "error", and
`error` string.
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
from serving.util.files import check_directory, check_utf8
from serving.util.finite import check_count
from serving.util.progress import Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkResult:
    """Contents of the output after a job, and throughput of this job."""

    output: str
    rows: int
    ok: int
    errors: int
    ignored: dict[str, int]
    """Number of other files in the source, by suffix; see `serving.util.directories.Found`."""
    first_errors: tuple[tuple[str, str], ...]
    """Name and reason of the first few."""
    shards: int
    skipped_shards: int
    """Shards that were finished before this job."""
    source_changed: bool
    """True if files were added or removed since the source was divided. The old shards are used."""
    runner: str
    workers: int
    threads: int
    embedded_rows: int
    """Rows embedded by this job."""
    start_s: float
    """Seconds until the first worker was ready: starting Ray and loading the model."""
    seconds: float
    """Seconds from then on."""

    rows_per_s: float
    """Throughput of this job once a worker was ready."""


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
    """Embed all images of `source` into Parquet shards in `output`, or resume such a job.

    On a cluster, every node needs this package, and `source`, `output` and `bundle` at the same
    paths. With an address `ray://host:port` the whole job runs on the cluster, and this machine
    needs none of these paths.

    Args:
        source: a directory, a file, or a pattern; see `serving.bulk.sources.find_source`.
        output: a new or empty directory, or that of a job with the same source, model and runner.
        bundle: directory that `clip-deploy export` wrote.
        runner: name of a runner, see `serving.runners.spec`. `auto` takes the fastest on a worker
            of those that passed the parity gate; a resumed job keeps its runner.
        resources: workers of the job and the Ray cluster.
        shard_size: maximum number of rows per shard. Default: 4,096, or fewer so that every worker
            has enough shards.
        batch_size: images per run of the model.
        image_column: Parquet column of the images. Default: `image` or `bytes`.
        path_column: Parquet column that names the rows. Default: `path` of the struct, or file and
            row number.
        progress: receives the number of finished shards.

    Raises:
        InputError: there is nothing to embed, `output` holds other files or another job, or a
            number is out of range.
        BundleError: the bundle does not exist or cannot be run.
        RunnerError: a worker failed.
        ServerError: no Ray cluster at the address, or Ray gave up.
    """
    check_count("batch_size", batch_size)
    if shard_size is not None:
        check_count("shard_size", shard_size)
    check_directory(output)
    for path in (Path(source), output):
        check_utf8(path)
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
    found, rows, ignored = find_source(source, image_column, path_column)
    output = output.absolute()
    if found.recursive and output.is_relative_to(found.root):
        raise InputError(
            f"--output {output} is inside SOURCE, {found.root}",
            advice="give a directory outside of it",
        )
    if runner != "auto":
        _check_runner(opened, runner, here=resources.address is None)
    started = time.time()
    with output_locked(output):
        begun = begun_job(output, found, opened, runner, shard_size)
        if begun is not None:
            progress("comparing the source with its list of shards")
        changed = begun is not None and source_changed(begun)
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
        ignored=dict(ignored),
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
    """Raise an error early if no worker could run `runner`."""
    spec = known(runner)
    precision, library = graph_of(spec), runtime_of(spec).library
    if library is None:
        bundle.artifact("image", precision)
    else:
        bundle.plans("image", precision, library)
    if here and (error := missing(spec)) is not None:
        raise RunnerError(error.reason, runner=runner, advice=error.advice)
