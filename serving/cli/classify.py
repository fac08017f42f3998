"""Command `classify`, which classifies images zero-shot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from serving.cli.console import Json, document, progress, result, table
from serving.cli.documents import Classified
from serving.cli.options import Connection, Images, connects, image_files
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.tasks.embedder import Floats
from serving.tasks.zero_shot import TEMPLATES, ZeroShotClassifier, in_batches, read_templates
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
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Classify images zero-shot: the probability of each label for each image."""
    files = image_files(images)
    names = [*(label or []), *(read_lines(labels) if labels else [])]
    prompts = [*(template or []), *(read_templates(templates) if templates else [])]
    with connection.open() as embedder, progress("classifying") as show:
        scores = _classified(embedder, files, names, prompts or None, show)
    if as_json:
        document(
            [
                Classified(
                    image=str(file),
                    probabilities=dict(zip(names, row.tolist(), strict=True)),
                )
                for file, row in zip(files, scores, strict=True)
            ]
        )
        return
    rows = [
        ("" if place else str(file), names[index], f"{row[index]:.1%}")
        for file, row in zip(files, scores, strict=True)
        for place, index in enumerate(np.argsort(-row, kind="stable")[:top])
    ]
    result(table("Zero-shot classification", ("image", "label", ">probability"), rows))


def _classified(
    embedder: ClipClient | LocalClip,
    files: Sequence[Path],
    labels: Sequence[str],
    templates: Sequence[str] | None,
    show: Progress,
) -> Floats:
    """Classify with the zero-shot model of the server, or with labels embedded in this process."""
    if isinstance(embedder, ClipClient):
        client = embedder
        batches = in_batches(
            lambda batch: client.classify(batch, labels, templates), files, _IMAGES
        )
    else:
        classifier = ZeroShotClassifier(embedder, labels, templates, progress=show)
        batches = classifier.batches(files, _IMAGES)
    parts: list[Floats] = []
    for start in range(0, len(files), _IMAGES):
        show("classifying images", start, len(files))
        parts.append(next(batches))
    return np.concatenate(parts)
