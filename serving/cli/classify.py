"""`python -m serving classify`: the probability of each label for each picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
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
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.tasks.embedder import Floats
from serving.tasks.zero_shot import TEMPLATES, ZeroShotClassifier, in_batches, read_templates
from serving.util.directories import read_lines
from serving.util.progress import Steps

_PICTURES = 64  # classified between two steps of the progress


def classify(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    label: Annotated[list[str] | None, typer.Option(help="A label; repeat for each.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, a label a line.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="What labels are put into, with a {}; repeat for each. Default: the checkpoint's "
            "own."
        ),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(help=f"Text file, a template a line; or built in: {', '.join(TEMPLATES)}."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels shown a picture.")] = 3,
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    as_json: Json = False,
) -> None:
    """Zero-shot classification: the probability of each label for each picture."""
    files = picture_files(pictures)
    names = [*(label or []), *(read_lines(labels) if labels else [])]
    prompts = [*(template or []), *(read_templates(templates) if templates else [])]
    with (
        embedder_of(url, bundle, runner, ca, cert, key) as embedder,
        steps("classifying") as progress,
    ):
        scores = _classified(embedder, files, names, prompts or None, progress)
    if as_json:
        rows = [
            {"picture": str(file), "probabilities": dict(zip(names, row.tolist(), strict=True))}
            for file, row in zip(files, scores, strict=True)
        ]
        print(json.dumps(rows))
        return
    table = Table(title="Zero-shot classification")
    for column in ("picture", "label", "probability"):
        table.add_column(column, overflow="fold")
    for file, row in zip(files, scores, strict=True):
        for rank, index in enumerate(np.argsort(-row, kind="stable")[:top]):
            first = "" if rank else escape(str(file))
            table.add_row(first, escape(names[index]), f"{row[index]:.1%}")
    out.print(table)


def _classified(
    embedder: ClipClient | LocalClip,
    files: Sequence[Path],
    labels: Sequence[str],
    templates: Sequence[str] | None,
    progress: Steps,
) -> Floats:
    """By the server's own zero-shot model, or by labels embedded in this process."""
    if isinstance(embedder, ClipClient):
        client = embedder
        batches = in_batches(
            lambda some: client.classify(some, labels, templates), files, _PICTURES
        )
    else:
        classifier = ZeroShotClassifier(
            embedder,
            labels,
            templates,
            progress=lambda done, total: progress("embedding labels", done, total),
        )
        batches = classifier.batches(files, _PICTURES)
    parts: list[Floats] = []
    for start in range(0, len(files), _PICTURES):
        progress("classifying pictures", start, len(files))
        parts.append(next(batches))
    return np.concatenate(parts)
