"""`demo`: a bundle and a directory of images, served over HTTP and gRPC, on one contact sheet.

Everything here is what a user would do: assemble, start, classify, embed, search, stop.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table

from serving.bundles.bundle import Bundle
from serving.cli.console import Json, log, out
from serving.cli.contact_sheet import Cell, Row, contact_sheet
from serving.cli.options import REPOSITORY, BundlePath
from serving.clients.triton import ClipClient
from serving.search.query import nearest
from serving.tasks.zero_shot import ZeroShotClassifier
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from serving.util.directories import find_pictures, read_captions, read_lines

_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Classified:
    """What a picture was taken for, over each protocol."""

    picture: str
    caption: str
    http: str
    http_probability: float
    grpc: str
    grpc_probability: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A picture that a query found."""

    picture: str
    caption: str
    cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that a demonstration found."""

    pictures: int
    start_s: float
    """From nothing to a server that is ready."""
    embed_per_s: float
    """Pictures embedded a second over gRPC, client on the same machine."""
    accuracy: float | None
    """Share of captioned pictures whose label is the caption, when captions are labels."""
    protocols_differ_by: float
    """Largest difference of any probability between HTTP and gRPC."""
    classified: list[Classified]
    found: dict[str, list[Hit]]
    contact_sheet: str

    def to_json(self) -> dict[str, object]:
        """For `--json`."""
        return asdict(self)


def run_demo(
    bundle: Bundle,
    folder: Path,
    labels: Sequence[str],
    queries: Sequence[str],
    repository: Path,
    sheet: Path,
    shown: int = 8,
) -> Outcome:
    """Assemble and start a server for `bundle`, classify and search `folder`, draw a sheet."""
    pictures, captions = find_pictures(folder), read_captions(folder)
    assemble(bundle, repository)
    start = time.monotonic()
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        start_s = time.monotonic() - start
        log.print(f"Triton serves {repository} at {server.http_url} and {server.grpc_url}")
        sample = [p for p in pictures if captions.get(p.name) in labels][:shown] or pictures[:shown]
        with ClipClient(server.http_url) as client:
            over_http = client.classify(sample, labels)
        with ClipClient(server.grpc_url) as client:
            over_grpc = client.classify(sample, labels)
            start = time.monotonic()
            embeddings = _embed(client, pictures)
            embed_per_s = len(pictures) / (time.monotonic() - start)
            scores = ZeroShotClassifier(client, labels).classify_embeddings(embeddings)
            order, cosines = nearest(client.embed_texts(queries), embeddings, shown)
    outcome = Outcome(
        pictures=len(pictures),
        start_s=start_s,
        embed_per_s=embed_per_s,
        accuracy=_accuracy(scores, labels, [captions.get(p.name, "") for p in pictures]),
        protocols_differ_by=float(np.abs(over_http - over_grpc).max()),
        classified=[
            Classified(
                str(path),
                captions.get(path.name, ""),
                labels[int(http.argmax())],
                float(http.max()),
                labels[int(grpc.argmax())],
                float(grpc.max()),
            )
            for path, http, grpc in zip(sample, over_http, over_grpc, strict=True)
        ],
        found={
            query: [
                Hit(str(pictures[i]), captions.get(pictures[i].name, ""), float(cosine))
                for i, cosine in zip(indices, values, strict=True)
            ]
            for query, indices, values in zip(queries, order, cosines, strict=True)
        },
        contact_sheet=str(sheet),
    )
    _draw(bundle, outcome, sheet)
    return outcome


def _embed(client: ClipClient, pictures: list[Path]) -> NDArray[np.float32]:
    starts = range(0, len(pictures), _CHUNK)
    return np.concatenate(
        [
            client.embed_images(pictures[start : start + _CHUNK])
            for start in track(starts, f"embedding {len(pictures)} pictures", console=log)
        ]
    )


def _accuracy(
    scores: NDArray[np.float32], labels: Sequence[str], captions: list[str]
) -> float | None:
    """Over the pictures whose caption is one of the labels."""
    known = [i for i, caption in enumerate(captions) if caption in labels]
    if not known:
        return None
    right = [labels[int(scores[i].argmax())] == captions[i] for i in known]
    return sum(right) / len(right)


def _draw(bundle: Bundle, outcome: Outcome, sheet: Path) -> None:
    classified = [
        Cell(
            Path(c.picture),
            f"{c.grpc} {c.grpc_probability:.0%}",
            f"is: {c.caption}" if c.caption else "",
            c.grpc == c.caption if c.caption else None,
        )
        for c in outcome.classified
    ]
    rows = [Row("Zero-shot classification", classified)]
    for query, hits in outcome.found.items():
        cells = [Cell(Path(h.picture), f"{h.cosine:.3f}", h.caption) for h in hits]
        rows.append(Row(f"Search: {query}", cells))
    contact_sheet(f"{bundle.manifest.name} served by Triton", rows, sheet)


def tables(outcome: Outcome) -> list[Table]:
    """What people read of an outcome."""
    first = Table(title="Zero-shot classification")
    for column in ("picture", "caption", "over HTTP", "over gRPC"):
        first.add_column(column, overflow="fold")
    for c in outcome.classified:
        first.add_row(
            Path(c.picture).name,
            c.caption,
            f"{c.http} {c.http_probability:.1%}",
            f"{c.grpc} {c.grpc_probability:.1%}",
        )
    second = Table(title=f"Text-to-image search over {outcome.pictures} pictures")
    for column in ("query", "cosine", "picture", "caption"):
        second.add_column(column, overflow="fold")
    for query, hits in outcome.found.items():
        for rank, hit in enumerate(hits[:3]):
            second.add_row(
                "" if rank else query, f"{hit.cosine:.3f}", Path(hit.picture).name, hit.caption
            )
    return [first, second]


def demo(
    bundle: BundlePath,
    pictures: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    labels: Annotated[
        Path, typer.Option(help="Text file, a label a line.", exists=True, dir_okay=False)
    ],
    query: Annotated[list[str], typer.Option(help="What to search for; repeat for each.")],
    sheet: Annotated[Path, typer.Option(help="Contact sheet to write.")] = Path(
        "build/demo/contact_sheet.png"
    ),
    repository: Annotated[Path, typer.Option(help="Model repository to write.")] = REPOSITORY,
    as_json: Json = False,
) -> None:
    """Assemble, start, classify and search over HTTP and gRPC, draw a contact sheet, stop."""
    names = read_lines(labels)
    outcome = run_demo(Bundle.open(bundle), pictures, names, query, repository, sheet)
    if as_json:
        print(json.dumps(outcome.to_json()))
        return
    for table in tables(outcome):
        out.print(table)
    if outcome.accuracy is not None:
        out.print(f"zero-shot top-1 among {len(names)} labels: {outcome.accuracy:.1%}")
    out.print(
        f"server ready in {outcome.start_s:.1f} s, {outcome.embed_per_s:.0f} pictures/s over gRPC, "
        f"HTTP and gRPC differ by at most {outcome.protocols_differ_by:.1e}"
    )
    out.print(f"wrote {outcome.contact_sheet}")
