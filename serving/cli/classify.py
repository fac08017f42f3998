"""Command `classify`, which classifies images zero-shot."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from serving.cli.console import Json, document, note_skipped, progress, result, table
from serving.cli.documents import Classification, Classified
from serving.cli.options import (
    Connection,
    ImageFiles,
    Images,
    OnErrorOption,
    connects,
    image_files,
)
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.inputs.images import ImageInput
from serving.tasks.embedder import Floats
from serving.tasks.readable import all_in_batches
from serving.tasks.zero_shot import TEMPLATES, ZeroShotClassifier, read_templates
from serving.util.directories import read_lines
from serving.util.progress import Progress

_IMAGES = 64
"""Images classified between two progress reports."""


@connects
def classify(
    images: Images,
    label: Annotated[list[str] | None, typer.Option(help="Label; may be repeated.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file with one label per line.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt template with a {} for the label; may be repeated. Default: the "
            "checkpoint's own."
        ),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(
            help="Text file with one prompt template per line, or the name of a built-in set: "
            f"{', '.join(TEMPLATES)}."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of labels to show per image.")] = 3,
    on_error: OnErrorOption = "fail",
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Classify images zero-shot: the probability of each label for each image."""
    files = image_files(images, on_error)
    names = [*(label or []), *(read_lines(labels) if labels else [])]
    prompts = [*(template or []), *(read_templates(templates) if templates else [])]
    with connection.open() as embedder, progress("classifying") as show, files.advising():
        scores = _classified(embedder, files, names, prompts or None, show)
    classified = list(zip(map(str, files.used), scores, strict=True))
    if as_json:
        rows = ((file, dict(zip(names, row.tolist(), strict=True))) for file, row in classified)
        document(
            Classification(
                images=tuple(Classified(image=file, probabilities=row) for file, row in rows),
                skipped=files.skipped,
                ignored=files.ignored,
            )
        )
        return
    note_skipped(files.skipped, files.ignored)
    shown = [
        ("" if place else file, names[index], f"{row[index]:.1%}")
        for file, row in classified
        for place, index in enumerate(np.argsort(-row, kind="stable")[:top])
    ]
    result(table("Zero-shot classification", ("image", "label", ">probability"), shown))


def _classified(
    embedder: ClipClient | LocalClip,
    files: ImageFiles,
    labels: Sequence[str],
    templates: Sequence[str] | None,
    show: Progress,
) -> Floats:
    """Classify with the zero-shot model of the server, or with labels embedded in this process."""
    run: Callable[[Sequence[ImageInput]], Floats]
    if isinstance(embedder, ClipClient):
        run = partial(embedder.classify, labels=labels, templates=templates)
    else:
        run = ZeroShotClassifier(embedder, labels, templates, progress=show).classify
    return all_in_batches(
        run,
        files.paths,
        _IMAGES,
        files.errors,
        width=len(labels),
        step="classifying images",
        progress=show,
    )
