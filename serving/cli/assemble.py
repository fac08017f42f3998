"""`assemble`: a bundle becomes a model repository."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from serving.bundles.bundle import Bundle
from serving.cli.console import Json, out, steps
from serving.cli.options import REPOSITORY, BundlePath
from serving.triton.repository import MAX_QUEUE, assembled_backend, assembled_latencies
from serving.triton.repository import assemble as assemble_repository


def assemble(
    bundle: BundlePath,
    output: Annotated[Path, typer.Option(help="Model repository to write.")] = REPOSITORY,
    backend: Annotated[
        Literal["python", "onnxruntime", "tensorrt"],
        typer.Option(
            help="Triton backend that runs the towers. The embedded server has only python."
        ),
    ] = "python",
    runner: Annotated[
        str,
        typer.Option(
            help="Runner of the python backend, such as openvino:int8. auto times those that "
            "passed the parity gate and takes the fastest."
        ),
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="Precision of the other backends' artifacts.")
    ] = "fp32",
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
