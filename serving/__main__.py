"""`python -m serving`: bundle -> running service, and its use."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table

from serving.bundles.bundle import Bundle
from serving.cli.bulk import bulk
from serving.cli.classify import classify
from serving.cli.console import Json, log, out, run, steps
from serving.cli.demo import demo as run_demo
from serving.cli.demo import tables
from serving.cli.options import (
    LOCAL_RUNNER,
    REPOSITORY,
    BundlePath,
    Ca,
    Cert,
    Key,
    LocalBundle,
    LocalRunner,
    Url,
    embedder_of,
    picture_files,
)
from serving.cli.rank import app as rank_app
from serving.cli.search import app as search_app
from serving.cli.up import up
from serving.errors import InputError
from serving.triton.repository import MAX_QUEUE, assembled_backend, assembled_latencies
from serving.triton.repository import assemble as assemble_repository
from serving.util.directories import read_lines

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def assemble(
    bundle: BundlePath,
    output: Annotated[Path, typer.Option(help="Model repository to write.")] = REPOSITORY,
    backend: Annotated[
        Literal["embedded", "onnxruntime", "openvino", "tensorrt"],
        typer.Option(help="What runs the towers; embedded needs only Triton's Python backend."),
    ] = "embedded",
    runner: Annotated[
        str,
        typer.Option(
            help="Of the embedded backend, such as openvino:int8; auto takes the fastest that "
            "passed the gate."
        ),
    ] = "auto",
    precision: Annotated[str, typer.Option(help="Of the graphs of the other backends.")] = "fp32",
    max_batch_size: Annotated[int, typer.Option(min=1)] = 64,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that wait for a model; more are refused.")
    ] = MAX_QUEUE,
    refused_too: Annotated[
        bool, typer.Option("--refused-too", help="Serve what the parity gate refused.")
    ] = False,
    fallback: Annotated[
        bool,
        typer.Option(
            "--fallback", help="Where no TensorRT plan fits this machine, onnxruntime instead."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model repository for a bundle."""
    with steps(f"assembling {bundle}") as progress:
        path = assemble_repository(
            Bundle.open(bundle),
            output,
            backend=backend,
            runner=runner,
            precision=precision,
            max_batch_size=max_batch_size,
            max_queue=max_queue,
            refused_too=refused_too,
            fallback=fallback,
            progress=progress,
        )
    models = sorted(config.parent.name for config in path.glob("*/config.pbtxt"))
    latencies = assembled_latencies(path)
    if as_json:
        timed = [asdict(latency) for latency in latencies]
        document = {"repository": str(path), "backend": assembled_backend(path), "models": models}
        print(json.dumps({**document, "latencies": timed}))
        return
    if latencies:
        table = Table(title=f"Runners on {latencies[0].machine}, batches of {latencies[0].batch}")
        for column in ("tower", "runner", "ms"):
            table.add_column(column, justify="right" if column == "ms" else "left")
        for latency in latencies:
            table.add_row(latency.tower, latency.runner, f"{latency.milliseconds:.1f}")
        out.print(table)
    out.print(f"{path}: {', '.join(models)}")


app.command()(up)


@app.command()
def embed(
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Picture files, or folders of them.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="NumPy .npz with `embeddings` float32 [n, dim] and `names` [n]."),
    ] = None,
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = (
        False
    ),
    as_json: Json = False,
) -> None:
    """Embed pictures and texts: pictures first, then texts, in the order given."""
    files = picture_files(pictures or [])
    if not files and not text:
        raise InputError("nothing to embed; give picture files or folders, or --text")
    parts = []
    with embedder_of(url, bundle, runner, ca, cert, key) as embedder:
        starts = track(range(0, len(files), 64), "embedding pictures", console=log)
        parts += [embedder.embed_images(files[start : start + 64]) for start in starts]
        if text:
            parts.append(embedder.embed_texts(text, truncate=truncate))
    embeddings = np.concatenate(parts)
    names = [*map(str, files), *(text or [])]
    if output is not None:
        _save(output, embeddings, names)
    if as_json:
        rows = [] if output else embeddings.tolist()
        print(json.dumps({"names": names, "shape": embeddings.shape, "embeddings": rows}))
        return
    table = Table(title=f"{len(names)} embeddings of {embeddings.shape[1]} dimensions")
    for column in ("input", "first values"):
        table.add_column(column, overflow="fold")
    for name, row in list(zip(names, embeddings, strict=True))[:20]:
        table.add_row(name, " ".join(f"{value:+.4f}" for value in row[:6]) + " ...")
    out.print(table)
    if output:
        out.print(f"wrote {output}")


app.command()(classify)


@app.command()
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


def _save(path: Path, embeddings: NDArray[np.float32], names: list[str]) -> None:
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez(temporary, embeddings=embeddings, names=np.array(names))
    temporary.replace(path)


app.command()(bulk)

app.add_typer(rank_app)
app.add_typer(search_app, name="search")

if __name__ == "__main__":
    run(app)
