"""Command `demo`, which serves a bundle and classifies and searches a directory of images.

It runs the steps of a typical user: assemble, start the server, classify, embed, search, stop.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from serving.bundles.bundle import Bundle
from serving.cli.console import Json, document, progress, result, table
from serving.cli.contact_sheet import Cell, Row, contact_sheet
from serving.cli.options import REPOSITORY, BundlePath
from serving.clients.triton import ClipClient
from serving.search.query import nearest
from serving.tasks.zero_shot import ZeroShotClassifier
from serving.triton.repository import assemble, check_repository
from serving.triton.server import TritonServer
from serving.util.directories import find_images, read_captions, read_lines
from serving.util.files import check_file
from serving.util.progress import Progress

_CHUNK = 32


@dataclass(frozen=True, slots=True)
class DemoLabel:
    """Best label of an image over each protocol."""

    image: str
    caption: str
    http: str
    http_probability: float
    grpc: str
    grpc_probability: float


@dataclass(frozen=True, slots=True)
class DemoHit:
    """Image found by a query."""

    image: str
    caption: str
    cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Result of a demonstration."""

    images: int
    start_s: float
    """Seconds until the server was ready."""
    embed_per_s: float
    """Throughput of image embeddings over gRPC, in images/s, with a client on the same machine."""
    accuracy: float | None
    """Share of images with a label as caption whose best label is the caption. None without any."""
    protocols_differ_by: float
    """Maximum difference between a probability over HTTP and over gRPC."""
    classified: tuple[DemoLabel, ...]
    found: dict[str, tuple[DemoHit, ...]]
    """Hits by query, best first."""
    contact_sheet: str


def run_demo(
    bundle: Bundle,
    directory: Path,
    labels: Sequence[str],
    queries: Sequence[str],
    repository: Path,
    sheet: Path,
    show: Progress,
    shown: int = 8,
) -> DemoResult:
    """Serve `bundle`, classify and search the images of `directory`, and draw a contact sheet."""
    images, captions = find_images(directory).files, read_captions(directory)
    assemble(bundle, repository, progress=show)
    start = time.monotonic()
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        start_s = time.monotonic() - start
        show(f"Triton serves {repository} at {server.http_url} and {server.grpc_url}")
        sample = [p for p in images if captions.get(p.name) in labels][:shown] or images[:shown]
        with ClipClient(server.http_url) as client:
            over_http = client.classify(sample, labels)
        with ClipClient(server.grpc_url) as client:
            over_grpc = client.classify(sample, labels)
            start = time.monotonic()
            embeddings = _embed(client, images, show)
            embed_per_s = len(images) / (time.monotonic() - start)
            scores = ZeroShotClassifier(client, labels).classify_embeddings(embeddings)
            order, cosines = nearest(client.embed_texts(queries), embeddings, shown)
    outcome = DemoResult(
        images=len(images),
        start_s=start_s,
        embed_per_s=embed_per_s,
        accuracy=_accuracy(scores, labels, [captions.get(p.name, "") for p in images]),
        protocols_differ_by=float(np.abs(over_http - over_grpc).max()),
        classified=tuple(
            DemoLabel(
                str(path),
                captions.get(path.name, ""),
                labels[int(http.argmax())],
                float(http.max()),
                labels[int(grpc.argmax())],
                float(grpc.max()),
            )
            for path, http, grpc in zip(sample, over_http, over_grpc, strict=True)
        ),
        found={
            query: tuple(
                DemoHit(str(images[i]), captions.get(images[i].name, ""), float(cosine))
                for i, cosine in zip(indices, values, strict=True)
            )
            for query, indices, values in zip(queries, order, cosines, strict=True)
        },
        contact_sheet=str(sheet),
    )
    _draw(bundle, outcome, sheet)
    return outcome


def _embed(client: ClipClient, images: list[Path], show: Progress) -> NDArray[np.float32]:
    parts = []
    for start in range(0, len(images), _CHUNK):
        show(f"embedding {len(images)} images", start, len(images))
        parts.append(client.embed_images(images[start : start + _CHUNK]))
    return np.concatenate(parts)


def _accuracy(
    scores: NDArray[np.float32], labels: Sequence[str], captions: list[str]
) -> float | None:
    """Return the accuracy over the images whose caption is one of the labels."""
    known = [i for i, caption in enumerate(captions) if caption in labels]
    if not known:
        return None
    right = [labels[int(scores[i].argmax())] == captions[i] for i in known]
    return sum(right) / len(right)


def _draw(bundle: Bundle, outcome: DemoResult, sheet: Path) -> None:
    classified = [
        Cell(
            Path(c.image),
            f"{c.grpc} {c.grpc_probability:.0%}",
            f"is: {c.caption}" if c.caption else "",
            c.grpc == c.caption if c.caption else None,
        )
        for c in outcome.classified
    ]
    rows = [Row("Zero-shot classification", classified)]
    for query, hits in outcome.found.items():
        cells = [Cell(Path(h.image), f"{h.cosine:.3f}", h.caption) for h in hits]
        rows.append(Row(f"Search: {query}", cells))
    contact_sheet(f"{bundle.manifest.name} served by Triton", rows, sheet)


def demo(
    bundle: BundlePath,
    images: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of images.")],
    labels: Annotated[
        Path,
        typer.Option(help="Text file with one label per line.", exists=True, dir_okay=False),
    ],
    query: Annotated[list[str], typer.Option(help="Text to search for; may be repeated.")],
    sheet: Annotated[Path, typer.Option(help="Contact sheet to write, as PNG.")] = Path(
        "build/demo/contact_sheet.png"
    ),
    output: Annotated[Path, typer.Option(help="Model repository to write.")] = REPOSITORY,
    as_json: Json = False,
) -> None:
    """Serve a bundle, classify and search a directory of images, and draw a contact sheet."""
    check_file(sheet)
    check_repository(output)
    names = read_lines(labels)
    with progress(f"assembling {bundle}") as show:
        outcome = run_demo(Bundle.open(bundle), images, names, query, output, sheet, show)
    if as_json:
        document(outcome)
        return
    labeled = [
        (
            Path(c.image).name,
            c.caption,
            f"{c.http} {c.http_probability:.1%}",
            f"{c.grpc} {c.grpc_probability:.1%}",
        )
        for c in outcome.classified
    ]
    columns = ("image", "caption", "over HTTP", "over gRPC")
    result(table("Zero-shot classification", columns, labeled))
    found = [
        ("" if rank else text, f"{hit.cosine:.3f}", Path(hit.image).name, hit.caption)
        for text, hits in outcome.found.items()
        for rank, hit in enumerate(hits[:3])
    ]
    title = f"Text-to-image search over {outcome.images} images"
    result(table(title, ("query", ">cosine", "image", "caption"), found))
    if outcome.accuracy is not None:
        result(f"zero-shot top-1 among {len(names)} labels: {outcome.accuracy:.1%}")
    result(
        f"server ready in {outcome.start_s:.1f} s, {outcome.embed_per_s:.0f} images/s over gRPC, "
        f"HTTP and gRPC differ by at most {outcome.protocols_differ_by:.1e}"
    )
    result(f"wrote {outcome.contact_sheet}")
