"""Command `bulk`, which embeds any number of images into Parquet shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.console import Json, document, note, progress, result, table
from serving.errors import InputError
from serving.util.directories import described
from serving.util.extras import require

if TYPE_CHECKING:
    from serving.bulk.job import BulkResult


def bulk(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Directory of images, Parquet files or WebDataset tars, one such file, or a "
            "pattern in quotes: 'data/**/*.tar'. Names that exist are taken literally.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory of Parquet shards to write.")],
    bundle: Annotated[Path, typer.Option(help="Directory that `clip-deploy export` wrote.")],
    runner: Annotated[
        str,
        typer.Option(
            help="Runner, such as openvino:int8. auto times those that passed the parity gate on a "
            "worker and takes the fastest."
        ),
    ] = "auto",
    image_column: Annotated[
        str | None,
        typer.Option(help="Parquet column of encoded images. Default: image or bytes."),
    ] = None,
    path_column: Annotated[
        str | None,
        typer.Option(help="Parquet column that names the rows. Default: file and row number."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of workers. Default: as many as fit.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads per worker. Default: 4, or a GPU's share of the CPUs."),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs per worker. Default: 1 for a runner on GPUs, else 0."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum rows per shard. Default: up to 4096."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster: auto, host:port or ray://host:10001. Its nodes need "
            "this package, and SOURCE, --output and --bundle at the same paths. Default: Ray "
            "starts on this machine and stops with the job."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Embed any number of images into Parquet shards.

    If the job was interrupted, the same command resumes it. A row that cannot be embedded is
    recorded as an error; the exit code is 2 if that is so for all rows.
    """
    require("bulk", "bulk", "ray", "pyarrow")
    from serving.bulk.job import bulk_embed
    from serving.bulk.ray_pool import Resources

    resources = Resources(workers=workers, threads=threads, gpus=gpus, address=address)
    with progress(f"reading {source}") as show:
        outcome = bulk_embed(
            source,
            output,
            bundle,
            runner=runner,
            resources=resources,
            shard_size=shard_size,
            batch_size=batch_size,
            image_column=image_column,
            path_column=path_column,
            progress=show,
        )
    if as_json:
        document(outcome)
    else:
        _show(outcome)
    if not outcome.ok:
        name, reason = outcome.first_errors[0]
        raise InputError(f"none of the {outcome.rows} rows has an embedding; {name}: {reason}")


def _show(outcome: "BulkResult") -> None:
    facts = {
        "rows": f"{outcome.rows:,}",
        "errors": f"{outcome.errors:,}",
        "shards": f"{outcome.shards:,}, {outcome.skipped_shards:,} of them finished before",
        "runner": outcome.runner,
    }
    if outcome.workers:
        facts |= {
            "workers": f"{outcome.workers}, {outcome.threads} threads each",
            "start": f"{outcome.start_s:.1f} s",
            "embedding": f"{outcome.seconds:.1f} s, {outcome.rows_per_s:.1f} images/s",
        }
    result(table(f"Embeddings in {outcome.output}", ("", ""), facts.items()))
    for path, reason in outcome.first_errors:
        note(f"error {path}: {reason}", "red")
    if outcome.ignored:
        note(f"ignored {described(outcome.ignored)}")
    if outcome.source_changed:
        note(
            "SOURCE has changed since this job began; the original list of shards was used. To "
            "embed new images, give another --output."
        )
