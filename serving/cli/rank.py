"""Commands `rank`, `answer` and `caption`, which rank texts for images."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from serving.cli.console import Json, document, note_skipped, progress, result, table
from serving.cli.documents import Answered, Captioned, Captions, Ranked, Ranking
from serving.cli.options import (
    Connection,
    Images,
    OnErrorOption,
    Truncate,
    connects,
    image_files,
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
from serving.tasks.rank import caption as caption_images
from serving.tasks.rank import rank as rank_texts
from serving.util.directories import read_lines


@connects
def rank(
    images: Images,
    text: Annotated[list[str] | None, typer.Option(help="Text; may be repeated.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Text file with one text per line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of texts to show per image.")] = 5,
    truncate: Truncate = False,
    on_error: OnErrorOption = "fail",
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Rank texts for each image by cosine, and show their probabilities among all texts."""
    if bool(text) == (texts is not None):
        raise InputError(
            f"expected either --text or --texts, got {'both' if text else 'neither'}",
            advice="give the texts to rank with one of them",
        )
    choices = text or (read_lines(texts) if texts else [])
    files = image_files(images, on_error)
    with connection.open() as embedder, progress("embedding texts") as show, files.advising():
        scores = rank_texts(
            embedder, files.paths, choices, truncate=truncate, errors=files.errors, progress=show
        )
    ranked = list(zip(map(str, files.used), scores, strict=True))
    if as_json:
        document(
            Ranking(
                images=tuple(Ranked(image=file, texts=tuple(best)) for file, best in ranked),
                skipped=files.skipped,
                ignored=files.ignored,
            )
        )
        return
    note_skipped(files.skipped, files.ignored)
    _show(f"{len(choices)} texts ranked", "text", [(file, best[:top]) for file, best in ranked])


@connects
def answer(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[
        str,
        typer.Option(
            help="Prompt about the image. Works better as the start of a sentence than as a "
            "question."
        ),
    ],
    candidate: Annotated[list[str], typer.Option(help="Possible answer; may be repeated.")],
    template: Annotated[
        str,
        typer.Option(help="Prompt template with {answer}, and optionally {question}."),
    ] = QUESTION_TEMPLATE,
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Answer a multiple-choice question about an image."""
    with connection.open() as embedder:
        scores = rank_answers(embedder, image, question, candidate, template=template)
    if as_json:
        document(Answered(image=str(image), question=question, answers=tuple(scores)))
        return
    _show(question, "answer", [(str(image), scores)])


@connects
def caption(
    images: Images,
    categories: Annotated[
        Path,
        typer.Option(
            help="TOML or JSON file with, for each category, a list of words or a table of words "
            "and template."
        ),
    ],
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum probability of a word within its category.")
    ] = THRESHOLD,
    separator: Annotated[
        str, typer.Option(help="Separator between the words of a caption.")
    ] = SEPARATOR,
    on_error: OnErrorOption = "fail",
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Caption images with the best word of each category."""
    vocabulary, files = read_vocabulary(categories), image_files(images, on_error)
    with connection.open() as embedder, progress("embedding texts") as show, files.advising():
        captions = caption_images(
            embedder,
            files.paths,
            vocabulary,
            threshold=threshold,
            separator=separator,
            errors=files.errors,
            progress=show,
        )
    found = list(zip(map(str, files.used), captions, strict=True))
    if as_json:
        document(
            Captions(
                images=tuple(Captioned(image=f, caption=c.text, best=c.best) for f, c in found),
                skipped=files.skipped,
                ignored=files.ignored,
            )
        )
        return
    note_skipped(files.skipped, files.ignored)
    rows = [
        (file, c.text or "-", *(f"{s.text} {s.probability:.1%}" for s in c.best.values()))
        for file, c in found
    ]
    columns = ("image", "caption", *(category.name for category in vocabulary))
    result(table("Captions", columns, rows))


def _show(title: str, column: str, ranked: Iterable[tuple[str, list[Score]]]) -> None:
    def rows() -> Iterator[tuple[str, ...]]:
        for image, scores in ranked:
            for place, score in enumerate(scores):
                numbers = f"{score.cosine:.3f}", f"{score.probability:.1%}"
                yield ("" if place else image, score.text, *numbers)

    result(table(title, ("image", column, ">cosine", ">probability"), rows()))
