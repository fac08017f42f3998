"""`python -m serving search query`: what is found with an index."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from serving.cli.console import Json, log, out
from serving.cli.contact_sheet import Cell, Row, contact_sheet
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
from serving.errors import ImageError, InputError, TextError
from serving.inputs.decode import read_picture
from serving.search.query import Term

if TYPE_CHECKING:
    from serving.search.index import Hit, SearchIndex

IndexPath = Annotated[
    Path, typer.Argument(metavar="INDEX", help="Folder that `search build` wrote.")
]
_TOP = 10
_WITHOUT = 0.25
"""Weight of what is not wanted. All texts have much in common, and as much as that is taken from
the query too: at 1, what was looked for is gone. 0.25 found the most (see docs/decisions.md)."""
_COLUMNS = 5
_HEADING = 90
"""Characters of a heading that fit over so many columns."""


def query(
    index: IndexPath,
    text: Annotated[list[str] | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to look for alike.")] = None,
    without: Annotated[
        list[str] | None, typer.Option("--not", help="What is not wanted, in words.")
    ] = None,
    without_image: Annotated[
        list[Path] | None, typer.Option("--not-image", help="A picture unlike what is wanted.")
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Of each text, then each --image, --not and --not-image, in this order. Default: "
            f"1, and {_WITHOUT} of what is not wanted. Pictures count for more than texts of the "
            "same weight.",
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help=f"Pictures to find; default {_TOP}.")
    ] = None,
    glob: Annotated[
        list[str] | None,
        typer.Option(help="Only paths that fit, such as 'holidays/*'; repeat for alternatives."),
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet to write, a PNG.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = (
        False
    ),
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    as_json: Json = False,
) -> None:
    """Find pictures by texts, by pictures, by both, and by what they are not.

    The terms are unit vectors: weighted, added (those of --not subtracted), the sum brought back to
    unit length, and compared by cosine.
    """
    terms = _terms(text or [], image or [], without or [], without_image or [], weight)
    from serving.search.index import SearchIndex

    opened = SearchIndex.open(index)
    count = min(_TOP, opened.manifest.count) if top is None else top
    with embedder_of(url, bundle, runner, ca, cert, key) as embedder, _offering_truncate():
        hits = opened.find(embedder, terms, count, glob or (), truncate=truncate)
    if len(hits) < count:
        log.print(f"only {len(hits)} pictures fit --glob", highlight=False)
    title = _title(terms)
    if sheet is not None:
        _draw(opened, title, image or [], hits, sheet)
    if as_json:
        rows = [{**asdict(hit), "file": str(opened.file(hit.path))} for hit in hits]
        print(json.dumps({"index": str(index), "query": title, "hits": rows, "sheet": _str(sheet)}))
        return
    table = Table(title=escape(title))
    table.add_column("", justify="right")
    table.add_column("cosine", justify="right")
    # Or the title would be folded to the width of what is under it.
    table.add_column("picture", overflow="fold", min_width=min(len(title), out.width - 6) - 14)
    for rank, hit in enumerate(hits, 1):
        table.add_row(str(rank), f"{hit.cosine:.3f}", escape(printable(hit.path)))
    out.print(table)
    if sheet is not None:
        out.print(f"wrote {sheet}", highlight=False)


def _terms(
    texts: list[str],
    images: list[Path],
    without: list[str],
    without_images: list[Path],
    weights: list[float] | None,
) -> list[Term]:
    terms = [
        *(Term(text=text) for text in texts),
        *(Term(picture=image) for image in images),
        *(Term(text=text, weight=-_WITHOUT) for text in without),
        *(Term(picture=image, weight=-_WITHOUT) for image in without_images),
    ]
    if not texts and not images:
        raise InputError(
            "nothing to look for; give a text, such as 'a red circle', or --image FILE "
            "(--not only takes away)"
        )
    if not weights:
        return terms
    if len(weights) != len(terms):
        raise InputError(
            f"{len(weights)} weights for {len(terms)} terms; give one --weight for each text, "
            "--image, --not and --not-image, in this order, or none"
        )
    return [
        replace(term, weight=math.copysign(weight, term.weight))
        for term, weight in zip(terms, weights, strict=True)
    ]


def _title(terms: list[Term]) -> str:
    """Such as `a red circle + 0.5 photo.jpg - a star`."""
    words = ""
    for term in terms:
        name = term.text if term.text is not None else Path(str(term.picture)).name
        sign = " - " if term.weight < 0 else " + " if words else ""
        factor = "" if abs(term.weight) == 1 else f"{abs(term.weight):g} "
        words += f"{sign}{factor}{name}"
    return words


@contextmanager
def _offering_truncate() -> Iterator[None]:
    """A text too long: say what this command has against it, not what the function has."""
    try:
        yield
    except TextError as error:
        raise TextError(str(error).replace("pass truncate=True", "give --truncate")) from error


def _draw(
    index: "SearchIndex", title: str, images: list[Path], hits: "list[Hit]", sheet: Path
) -> None:
    cells = []
    for hit in hits:
        try:
            read_picture(index.file(hit.path))
        except ImageError as error:
            told = printable(f"not on the sheet: {error}")
            log.print(told, highlight=False, markup=False, soft_wrap=True)
        else:
            cells.append(Cell(index.file(hit.path), f"{hit.cosine:.3f}", printable(hit.path)))
    if not cells:
        raise InputError(f"no file that was found is there any more; `search update {index.path}`")
    rows = [Row("Looked for", [Cell(image, image.name) for image in images])] if images else []
    for start in range(0, len(cells), _COLUMNS):
        heading = f"Nearest of {index.manifest.count} pictures" if not start else ""
        rows.append(Row(heading, cells[start : start + _COLUMNS]))
    shown = title if len(title) <= _HEADING else title[: _HEADING - 1] + "…"
    contact_sheet(shown, rows, sheet)


def printable(name: str) -> str:
    """A file's name as it can be printed: what is not UTF-8 in it becomes a question mark."""
    return name.encode("utf-8", "replace").decode()


def _str(path: Path | None) -> str | None:
    return None if path is None else str(path)
