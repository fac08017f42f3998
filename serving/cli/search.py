"""`python -m serving search`: a search index over pictures, and what is found with it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from serving.cli.console import Json, log, out, steps
from serving.cli.options import (
    LOCAL_RUNNER,
    Ca,
    Cert,
    Key,
    LocalBundle,
    LocalRunner,
    Url,
    embedder_of,
)
from serving.cli.search_query import IndexPath, printable, query

if TYPE_CHECKING:
    from serving.search.build import Outcome
    from serving.search.storage import IndexManifest

app = typer.Typer(help=__doc__, no_args_is_help=True)

_SHOWN_SKIPPED = 10


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of pictures.")],
    index: Annotated[Path, typer.Option(help="Folder of the index to write.")],
    kind: Annotated[
        Literal["exact", "hnsw", "ivf"] | None,
        typer.Option(
            help="hnsw and ivf find most of the nearest faster. Default: as it is; exact."
        ),
    ] = None,
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    as_json: Json = False,
) -> None:
    """Make an index of a folder of pictures, or bring it up to date.

    Called again after it was stopped, it goes on where it was.
    """
    from serving.search import build as search_build

    with (
        embedder_of(url, bundle, runner, ca, cert, key) as embedder,
        steps(f"looking at {folder}") as progress,
    ):
        outcome = search_build.build(folder, index, embedder, kind, progress=progress)
    _tell(index, outcome, as_json)


@app.command()
def update(
    index: IndexPath,
    folder: Annotated[
        Path | None, typer.Option(help="Where the pictures are now, if they were moved.")
    ] = None,
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    as_json: Json = False,
) -> None:
    """Embed new and changed files of the index's folder, and take out those that are gone."""
    from serving.search import build as search_build

    with (
        embedder_of(url, bundle, runner, ca, cert, key) as embedder,
        steps(f"updating {index}") as progress,
    ):
        outcome = search_build.update(index, embedder, folder, progress=progress)
    _tell(index, outcome, as_json)


@app.command()
def add(
    index: IndexPath,
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    as_json: Json = False,
) -> None:
    """Add pictures to an index; those that changed since are embedded again."""
    from serving.search import build as search_build

    with (
        embedder_of(url, bundle, runner, ca, cert, key) as embedder,
        steps(f"adding to {index}") as progress,
    ):
        outcome = search_build.add(index, pictures, embedder, progress=progress)
    _tell(index, outcome, as_json)


@app.command()
def remove(
    index: IndexPath,
    globs: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="As the index names them, or globs.")
    ],
    as_json: Json = False,
) -> None:
    """Take pictures out of an index; the files stay."""
    from serving.search import build as search_build

    _tell(index, search_build.remove(index, globs), as_json)


@app.command()
def info(index: IndexPath, as_json: Json = False) -> None:
    """What an index holds, after its files were checked."""
    from serving.search.index import SearchIndex

    manifest = SearchIndex.open(index).manifest
    if as_json:
        print(json.dumps({"index": str(index), **asdict(manifest)}))
        return
    table = Table(title=str(index), show_header=False)
    for name, value in (
        ("pictures", f"{manifest.count} of {manifest.folder}"),
        ("model", str(manifest.model)),
        ("kind", _kind(manifest)),
        ("written", manifest.created),
        ("size", f"{sum(file.bytes for file in manifest.files) / 1e6:.1f} MB"),
    ):
        table.add_row(name, escape(value))
    out.print(table)
    _tell_skipped(manifest)


app.command()(query)


def _tell(index: Path, outcome: "Outcome", as_json: bool) -> None:
    """What became of the index."""
    manifest = outcome.manifest
    counts = {
        name: getattr(outcome, name) for name in ("embedded", "resumed", "kept", "removed")
    } | {"skipped": len(manifest.skipped)}
    if as_json:
        document: dict[str, Any] = {"index": str(index), "pictures": manifest.count, **counts}
        skipped = [asdict(item) for item in manifest.skipped]
        print(json.dumps(document | {"layout": asdict(manifest.layout), "skipped": skipped}))
        return
    _tell_skipped(manifest)
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    out.print(
        f"{index}: {manifest.count} pictures, {_kind(manifest)} ({told})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _tell_skipped(manifest: "IndexManifest") -> None:
    for item in manifest.skipped[:_SHOWN_SKIPPED]:
        told = printable(f"skipped {item.path}: {item.reason}")
        log.print(told, highlight=False, markup=False, soft_wrap=True)
    if len(manifest.skipped) > _SHOWN_SKIPPED:
        more = len(manifest.skipped) - _SHOWN_SKIPPED
        log.print(f"and {more} more; `search info --json` names them all", highlight=False)


def _kind(manifest: "IndexManifest") -> str:
    layout = manifest.layout
    if layout.recall_at_10 is None:
        return layout.kind
    parameters = ", ".join(f"{name} {value}" for name, value in layout.parameters.items())
    return (
        f"{layout.kind} with {parameters}: recall@10 {layout.recall_at_10:.3f} "
        f"by {layout.recall_queries} queries"
    )
