"""Command `assemble`, which writes a model repository for a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from serving.bundles.bundle import Bundle
from serving.cli.console import Json, document, progress, result, table
from serving.cli.documents import Assembled
from serving.cli.options import REPOSITORY, BundlePath, ExifOrientation, Scale16Bit
from serving.triton.repository import (
    MAX_QUEUE,
    Backend,
    assembled_backend,
    assembled_latencies,
    check_repository,
)
from serving.triton.repository import assemble as assemble_repository


def assemble(
    bundle: BundlePath,
    output: Annotated[Path, typer.Option(help="Model repository to write.")] = REPOSITORY,
    backend: Annotated[
        Backend,
        typer.Option(
            help="Triton backend that runs the towers. The embedded server supports only python."
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
        str, typer.Option(help="Precision of the artifacts for backends other than python.")
    ] = "fp32",
    max_batch_size: Annotated[int, typer.Option(min=1, help="Maximum batch size of a tower.")] = 64,
    max_queue: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of waiting requests per model; more are rejected."
        ),
    ] = MAX_QUEUE,
    allow_failed: Annotated[
        bool,
        typer.Option("--allow-failed", help="Also serve artifacts that failed the parity gate."),
    ] = False,
    fallback: Annotated[
        bool,
        typer.Option(
            "--fallback",
            help="With --backend tensorrt: use onnxruntime if no engine runs on this machine.",
        ),
    ] = False,
    exif_orientation: ExifOrientation = False,
    scale_16_bit: Scale16Bit = False,
    as_json: Json = False,
) -> None:
    """Write a model repository for a bundle."""
    check_repository(output)
    with progress(f"assembling {bundle}") as show:
        path = assemble_repository(
            Bundle.open(bundle),
            output,
            backend=backend,
            runner=runner,
            precision=precision,
            max_batch_size=max_batch_size,
            max_queue=max_queue,
            allow_failed=allow_failed,
            fallback=fallback,
            exif_orientation=exif_orientation,
            scale_16_bit=scale_16_bit,
            progress=show,
        )
    assembled = Assembled(
        repository=str(path),
        backend=assembled_backend(path),
        models=tuple(sorted(config.parent.name for config in path.glob("*/config.pbtxt"))),
        latencies=assembled_latencies(path),
    )
    if as_json:
        document(assembled)
        return
    if assembled.latencies:
        first = assembled.latencies[0]
        rows = [(one.tower, one.runner, f"{one.milliseconds:.1f}") for one in assembled.latencies]
        title = f"Runners on {first.machine}, batches of {first.batch}"
        result(table(title, ("tower", "runner", ">ms"), rows))
    result(f"{path}: {', '.join(assembled.models)}")
