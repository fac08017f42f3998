"""`python -m serving rank`, `answer` and `caption`: texts ranked for pictures."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from serving.cli.console import Json, out, steps
from serving.cli.options import (
    LOCAL_RUNNER,
    Ca,
    Cert,
    Key,
    LocalBundle,
    LocalRunner,
    Url,
    embedder_of,
    picture_files,
)
from serving.errors import InputError
from serving.tasks.rank import (
    QUESTION_TEMPLATE,
    SEPARATOR,
    THRESHOLD,
    Score,
    read_vocabulary,
)
from serving.tasks.rank import answer as rank_answers
from serving.tasks.rank import caption as caption_pictures
from serving.tasks.rank import rank as rank_texts
from serving.tasks.zero_shot import Progress
from serving.util.directories import read_lines

Pictures = Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")]


def rank(
    pictures: Pictures,
    text: Annotated[list[str] | None, typer.Option(help="A text; repeat for each.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Text file, a text a line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Texts shown a picture.")] = 5,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are too long.")
    ] = False,
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    as_json: Json = False,
) -> None:
    """Rank free texts for each picture: cosine, and probability among the texts."""
    if bool(text) == (texts is not None):
        raise InputError("give the texts to rank either by --text or by --texts FILE")
    choices = text or (read_lines(texts) if texts else [])
    files = picture_files(pictures)
    with embedder_of(url, bundle, runner, ca, cert, key) as embedder, _embedding() as progress:
        ranked = rank_texts(embedder, files, choices, truncate=truncate, progress=progress)
    if as_json:
        rows = [
            {"picture": str(file), "texts": [asdict(score) for score in scores]}
            for file, scores in zip(files, ranked, strict=True)
        ]
        print(json.dumps(rows))
        return
    table = _table(f"{len(choices)} texts ranked", "picture", "text")
    for file, scores in zip(files, ranked, strict=True):
        _add(table, str(file), scores[:top])
    out.print(table)


def answer(
    picture: Annotated[Path, typer.Argument(help="Picture file.")],
    question: Annotated[str, typer.Option(help="About the picture; better begun than asked.")],
    candidate: Annotated[list[str], typer.Option(help="A possible answer; repeat for each.")],
    template: Annotated[
        str, typer.Option(help="How the two are put together; {question} may be left out.")
    ] = QUESTION_TEMPLATE,
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    as_json: Json = False,
) -> None:
    """Answer a multiple-choice question about a picture."""
    with embedder_of(url, bundle, runner, ca, cert, key) as embedder:
        scores = rank_answers(embedder, picture, question, candidate, template=template)
    if as_json:
        answers = [asdict(score) for score in scores]
        print(json.dumps({"picture": str(picture), "question": question, "answers": answers}))
        return
    table = _table(question, "picture", "answer")
    _add(table, str(picture), scores)
    out.print(table)


def caption(
    pictures: Pictures,
    vocabulary: Annotated[
        Path,
        typer.Option(
            help="TOML or JSON: category = [words], or words and template of each category."
        ),
    ],
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Least probability of a word in its category.")
    ] = THRESHOLD,
    separator: Annotated[str, typer.Option(help="Between the words of a caption.")] = SEPARATOR,
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    as_json: Json = False,
) -> None:
    """Caption pictures: the best word of each category of a vocabulary, joined."""
    categories, files = read_vocabulary(vocabulary), picture_files(pictures)
    with embedder_of(url, bundle, runner, ca, cert, key) as embedder, _embedding() as progress:
        captions = caption_pictures(
            embedder,
            files,
            categories,
            threshold=threshold,
            separator=separator,
            progress=progress,
        )
    if as_json:
        rows = [
            {
                "picture": str(file),
                "caption": found.text,
                "best": {name: asdict(score) for name, score in found.best.items()},
            }
            for file, found in zip(files, captions, strict=True)
        ]
        print(json.dumps(rows))
        return
    table = Table(title="Captions")
    for column in ("picture", "caption", *(category.name for category in categories)):
        table.add_column(escape(column), overflow="fold")
    for file, found in zip(files, captions, strict=True):
        best = [f"{score.text} {score.probability:.1%}" for score in found.best.values()]
        table.add_row(*map(escape, (str(file), found.text or "-", *best)))
    out.print(table)


@contextmanager
def _embedding() -> Iterator[Progress]:
    """What `serving.tasks.rank` tells of its progress, shown."""
    with steps("embedding texts") as show:
        yield lambda done, total: show("embedding pictures", done, total)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title))
    for column in columns:
        table.add_column(column, overflow="fold")
    for column in ("cosine", "probability"):
        table.add_column(column, justify="right")
    return table


def _add(table: Table, picture: str, scores: list[Score]) -> None:
    for place, score in enumerate(scores):
        name = "" if place else picture
        numbers = f"{score.cosine:.3f}", f"{score.probability:.1%}"
        table.add_row(escape(name), escape(score.text), *numbers)
