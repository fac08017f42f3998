"""`python -m serving bulk`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from serving.cli.console import Json, out, steps
from serving.util.extras import require

if TYPE_CHECKING:
    from serving.bulk.job import Outcome


def bulk(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of pictures, Parquet files or WebDataset tars, one such file, or a "
            "pattern in quotes: 'data/**/*.tar'.",
        ),
    ],
    output: Annotated[Path, typer.Option("--out", help="Folder of Parquet shards to write.")],
    bundle: Annotated[Path, typer.Option(help="Directory that `python -m export` made.")],
    runner: Annotated[
        str,
        typer.Option(
            help="Such as openvino:int8; auto takes the fastest on a worker that passed the gate."
        ),
    ] = "auto",
    image_column: Annotated[
        str | None,
        typer.Option(help="Of Parquet, encoded pictures; default: image or bytes."),
    ] = None,
    path_column: Annotated[
        str | None, typer.Option(help="Of Parquet, names the rows; default: file and row.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as the cluster holds.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of a worker; default: 4, or a GPU's share of the CPUs."),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="Of a worker; default: 1 for a runner on GPUs, else 0."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures a run.")] = 32,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows a shard at most; default: by the source, up to 4096."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Of a Ray cluster: auto or ray://host:10001. Its nodes need this package, and "
            "SOURCE, --out and --bundle at the same paths. Default: Ray starts here and stops."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Embed any number of pictures into Parquet shards; the same command again goes on."""
    require("bulk", "bulk", "ray", "pyarrow")
    from serving.bulk.job import bulk_embed
    from serving.bulk.ray_pool import Resources

    resources = Resources(workers=workers, threads=threads, gpus=gpus, address=address)
    with steps(f"looking at {source}") as progress:
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
            progress=progress,
        )
    if as_json:
        print(json.dumps({**asdict(outcome), "rows_per_s": outcome.rows_per_s}))
        return
    _show(outcome)


def _show(outcome: "Outcome") -> None:
    table = Table(title=f"Embeddings in {outcome.out}", show_header=False)
    facts = {
        "rows": f"{outcome.rows:,}",
        "errors": f"{outcome.errors:,}",
        "shards": f"{outcome.shards:,}, {outcome.skipped_shards:,} of them from before",
        "runner": outcome.runner,
    }
    if outcome.workers:
        facts |= {
            "workers": f"{outcome.workers}, of {outcome.threads} threads",
            "start": f"{outcome.start_s:.1f} s",
            "embedding": f"{outcome.seconds:.1f} s, {outcome.rows_per_s:.1f} pictures/s",
        }
    for key, value in facts.items():
        table.add_row(key, value)
    out.print(table)
    for path, reason in outcome.first_errors:
        out.print(f"[red]error[/] {escape(path)}: {escape(reason)}", highlight=False)
    if outcome.source_changed:
        out.print(
            "SOURCE has changed since this job was planned; the plan was followed. For what is "
            "new, give another --out."
        )
