"""Commands `search ...`, which build, change and search an index of images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from serving.cli.console import Json, document, note_skipped, progress, result, table
from serving.cli.documents import IndexChanged
from serving.cli.options import Connection, Images, connects
from serving.cli.search_query import IndexPath, query

if TYPE_CHECKING:
    from serving.search.build import IndexChange
    from serving.search.storage import IndexManifest

app = typer.Typer(help="Build, change and search an index of images.", no_args_is_help=True)

_WHOLE_LIST = "`search info --json`"
RemoveMissing = Annotated[
    bool,
    typer.Option(
        "--remove-missing-directories",
        help="Also remove the images of subdirectories that no longer exist or are empty. By "
        "default they are kept, because a disk may not be mounted.",
    ),
]


@app.command()
@connects
def build(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of images.")],
    output: Annotated[Path, typer.Option(help="Directory of the index to write.")],
    kind: Annotated[
        Literal["exact", "hnsw", "ivf"] | None,
        typer.Option(
            help="Kind of the index. hnsw and ivf are faster and find most of the nearest images. "
            "Default: the kind of the existing index; exact for a new one."
        ),
    ] = None,
    remove_missing: RemoveMissing = False,
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Build an index of a directory of images, or update it.

    If a build was interrupted, the same command resumes it.
    """
    from serving.search import build as search_build

    with connection.open() as embedder, progress(f"reading {directory}") as show:
        change = search_build.build(
            directory, output, embedder, kind, remove_missing=remove_missing, progress=show
        )
    _show(output, change, as_json)


@app.command()
@connects
def update(
    index: IndexPath,
    directory: Annotated[
        Path | None, typer.Option(help="Directory that the images were moved to.")
    ] = None,
    remove_missing: RemoveMissing = False,
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Embed the new and changed images of an index's directory, and remove the deleted ones."""
    from serving.search import build as search_build

    with connection.open() as embedder, progress(f"updating {index}") as show:
        change = search_build.update(
            index, embedder, directory, remove_missing=remove_missing, progress=show
        )
    _show(index, change, as_json)


@app.command()
@connects
def add(index: IndexPath, images: Images, as_json: Json = False, *, connection: Connection) -> None:
    """Add images to an index; images already in it are embedded again if they changed."""
    from serving.search import build as search_build

    with connection.open() as embedder, progress(f"adding to {index}") as show:
        change = search_build.add(index, images, embedder, progress=show)
    _show(index, change, as_json)


@app.command()
def remove(
    index: IndexPath,
    globs: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Paths in the index, or globs. A path that is in the index is taken literally.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Remove images from an index; the image files are not deleted."""
    from serving.search import build as search_build

    _show(index, search_build.remove(index, globs), as_json)


@app.command()
def info(index: IndexPath, as_json: Json = False) -> None:
    """Verify the files of an index, and show its contents."""
    from serving.search.index import SearchIndex

    manifest = SearchIndex.open(index).manifest
    if as_json:
        document(manifest)
        return
    rows = (
        ("images", f"{manifest.count} of {manifest.folder}"),
        ("model", str(manifest.model)),
        ("kind", _kind(manifest)),
        ("written", manifest.created),
        ("size", f"{sum(file.bytes for file in manifest.files) / 1e6:.1f} MB"),
    )
    result(table(str(index), ("", ""), rows))
    note_skipped(manifest.skipped, {}, _WHOLE_LIST)


app.command()(query)


def _show(index: Path, change: "IndexChange", as_json: bool) -> None:
    manifest = change.manifest
    if as_json:
        document(
            IndexChanged(
                index=str(index),
                images=manifest.count,
                embedded=change.embedded,
                resumed=change.resumed,
                kept=change.kept,
                removed=change.removed,
                layout=manifest.layout,
                skipped=manifest.skipped,
                ignored=change.ignored,
            )
        )
        return
    note_skipped(manifest.skipped, change.ignored, _WHOLE_LIST)
    counts = {
        "embedded": change.embedded,
        "resumed": change.resumed,
        "kept": change.kept,
        "removed": change.removed,
        "skipped": len(manifest.skipped),
    }
    listed = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    result(f"{index}: {manifest.count} images, {_kind(manifest)} ({listed})")


def _kind(manifest: "IndexManifest") -> str:
    layout = manifest.layout
    if layout.recall_at_10 is None:
        return layout.kind
    parameters = ", ".join(f"{name} {value}" for name, value in layout.parameters.items())
    return (
        f"{layout.kind} with {parameters}: recall@10 {layout.recall_at_10:.3f} "
        f"over {layout.recall_queries} queries"
    )
