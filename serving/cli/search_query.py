"""Command `search query`, which finds the images of an index that are nearest to a query."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.console import Json, document, note, result, table
from serving.cli.contact_sheet import Cell, Row, contact_sheet
from serving.cli.documents import Found, FoundHit
from serving.cli.options import Connection, Truncate, connects
from serving.errors import ImageError, InputError, TextTooLongError
from serving.inputs.decode import read_image
from serving.search.query import Term
from serving.util.files import check_file

if TYPE_CHECKING:
    from serving.search.index import Hit, SearchIndex

IndexPath = Annotated[
    Path, typer.Argument(metavar="INDEX", help="Directory that `search build` wrote.")
]
_TOP = 10
_WITHOUT = 0.25
"""Default weight of --not and --not-image. The embeddings of all texts have a large part in common,
which is subtracted too: with weight 1 little of the query would remain. 0.25 gave the best results
(docs/decisions/0025-search-index-generations.md)."""
_COLUMNS = 5
_HEADING = 90
"""Maximum number of characters in the title of a contact sheet."""


@connects
def query(
    index: IndexPath,
    text: Annotated[list[str] | None, typer.Argument(help="Text to search for.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image to find similar ones to; may be repeated.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--not", help="Text that the images should not match.")
    ] = None,
    without_image: Annotated[
        list[Path] | None,
        typer.Option("--not-image", help="Image that the images should not resemble."),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Weight of each text, then each --image, --not and --not-image, in this order. "
            f"Default: 1, and {_WITHOUT} for --not and --not-image. Images influence the result "
            "more than texts of the same weight.",
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help=f"Number of images to find. Default: {_TOP}.")
    ] = None,
    glob: Annotated[
        list[str] | None,
        typer.Option(
            help="Search only paths that match, such as 'holidays/*'; may be repeated. A path that "
            "is in the index is taken literally."
        ),
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet to write, as PNG.")] = None,
    truncate: Truncate = False,
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Find the images of an index that match texts and images, and do not match others.

    The query is the weighted sum of the embeddings of all terms, from which those of --not and
    --not-image are subtracted. Images are ranked by their cosine with this sum.
    """
    if sheet is not None:
        check_file(sheet)
    terms = _terms(text or [], image or [], without or [], without_image or [], weight)
    from serving.search.index import SearchIndex

    opened = SearchIndex.open(index)
    count = min(_TOP, opened.manifest.count) if top is None else top
    with connection.open() as embedder, _advising_truncate():
        hits = opened.find(embedder, terms, count, glob or (), truncate=truncate)
    if len(hits) < count:
        note(f"only {len(hits)} images match --glob")
    title = _title(terms)
    if sheet is not None:
        _draw(opened, title, image or [], hits, sheet)
    if as_json:
        found = tuple(FoundHit.of(hit, str(opened.file(hit.path))) for hit in hits)
        drawn = None if sheet is None else str(sheet)
        document(Found(index=str(index), query=title, hits=found, sheet=drawn))
        return
    rows = [(str(rank), f"{hit.cosine:.3f}", hit.path) for rank, hit in enumerate(hits, 1)]
    result(table(title, (">", ">cosine", "image"), rows))
    if sheet is not None:
        result(f"wrote {sheet}")


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
            "nothing to search for",
            advice="give a text, such as 'a red circle', or --image FILE (--not only subtracts)",
        )
    if not weights:
        return terms
    if len(weights) != len(terms):
        raise InputError(
            f"{len(weights)} weights for {len(terms)} terms",
            advice="give one --weight for each text, --image, --not and --not-image, in this "
            "order, or none",
        )
    return [
        replace(term, weight=math.copysign(weight, term.weight))
        for term, weight in zip(terms, weights, strict=True)
    ]


def _title(terms: list[Term]) -> str:
    """Return the query as a sum, such as `a red circle + 0.5 photo.jpg - a star`."""
    words = ""
    for term in terms:
        name = term.text if term.text is not None else Path(str(term.picture)).name
        sign = " - " if term.weight < 0 else " + " if words else ""
        factor = "" if abs(term.weight) == 1 else f"{abs(term.weight):g} "
        words += f"{sign}{factor}{name}"
    return words


@contextmanager
def _advising_truncate() -> Iterator[None]:
    """Advise --truncate if a text is too long, instead of the argument of the Python function."""
    try:
        yield
    except TextTooLongError as error:
        raise error.advised("shorten it or give --truncate") from error


def _draw(
    index: "SearchIndex", title: str, images: list[Path], hits: "list[Hit]", sheet: Path
) -> None:
    cells = []
    for hit in hits:
        try:
            read_image(index.file(hit.path))
        except ImageError as error:
            note(f"not on the sheet: {error}")
        else:
            cells.append(Cell(index.file(hit.path), f"{hit.cosine:.3f}", hit.path))
    if not cells:
        raise InputError(
            "none of the images that were found exists any more",
            advice=f"run `search update {index.path}`",
        )
    rows = [Row("Query", [Cell(image, image.name) for image in images])] if images else []
    for start in range(0, len(cells), _COLUMNS):
        heading = f"Nearest of {index.manifest.count} images" if not start else ""
        rows.append(Row(heading, cells[start : start + _COLUMNS]))
    shown = title if len(title) <= _HEADING else title[: _HEADING - 1] + "…"
    contact_sheet(shown, rows, sheet)
