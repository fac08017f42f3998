"""`python -m benchmarks`: how fast the runners of a bundle are, alone and served."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from serving.bundle import Bundle
from serving.commands import Json, log, out, run, steps
from serving.errors import RunnerError
from serving.files import write_text
from serving.machine import describe

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Directory that `python -m export` made.")
]
Output = Annotated[Path | None, typer.Option(help="JSON file to write as well.")]

_GPU_NEEDS = ("torch", "PIL", "tokenizers", "ftfy", "safetensors", "huggingface_hub")
"""Imported by `benchmarks.gpu` at once; what else an export or a runner needs may be absent, and is
then named beside what was left out."""


@app.command()
def latency(
    bundle: BundlePath,
    batch: Annotated[list[int] | None, typer.Option(help="Of pictures; may be repeated.")] = None,
    texts: Annotated[int, typer.Option(help="Batch of texts.")] = 32,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a text; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="The median of so many is taken.")] = 9,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="torch.compile too; needs a C++ compiler.")
    ] = False,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time every runner against eager float32, taking turns in one run."""
    from benchmarks.latency import Work
    from benchmarks.latency import latency as measure

    opened = Bundle.open(bundle)
    works = [Work(tower="image", batch=size) for size in batch or [1, 32]]
    works += [Work(tower="text", batch=texts, length=n) for n in length or [16]]
    with steps("loading") as progress:
        timings = measure(opened, works, rounds, progress, compiled=compiled)
    document = {
        "bundle": opened.manifest.name,
        "machine": describe(),
        "timings": [asdict(timing) for timing in timings],
    }
    _finish(document, output, as_json)
    if as_json:
        return
    table = Table(title=f"{opened.manifest.name} on {describe()}")
    for column in ("work", "runner", "ms", "x eager:fp32"):
        table.add_column(column, justify="left" if column in ("work", "runner") else "right")
    last = ""
    for t in timings:
        if last and t.work != last:
            table.add_section()
        table.add_row(
            "" if t.work == last else t.work, t.runner, f"{t.milliseconds:.1f}", f"{t.speedup:.2f}"
        )
        last = t.work
    out.print(table)


@app.command()
def served(
    bundle: BundlePath,
    pictures: Annotated[int, typer.Option(min=32)] = 192,
    rounds: Annotated[int, typer.Option(min=3, help="The median of so many is taken.")] = 5,
    runner: Annotated[str, typer.Option(help="As `python -m serving assemble` takes it.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Pictures a request.")] = 16,
    in_flight: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    repository: Annotated[Path, typer.Option()] = Path("build/benchmark_repository"),
    output: Output = None,
    as_json: Json = False,
) -> None:
    """JPEG 640x480 -> embedding over gRPC, against a loop around eager float32."""
    from benchmarks.served import served as measure

    with steps("loading") as progress:
        result = measure(
            Bundle.open(bundle),
            repository,
            pictures,
            rounds,
            progress,
            runner=runner,
            batch_size=batch_size,
            in_flight=in_flight,
        )
    _finish({"machine": describe(), **asdict(result)}, output, as_json)
    if not as_json:
        out.print(
            f"{result.served_per_s:.1f} pictures/s served by {result.runner} over gRPC, "
            f"{result.eager_per_s:.1f} by the eager fp32 loop: {result.speedup:.2f}x; one at a "
            f"time {result.latency_ms:.1f} ms; on {describe()}"
        )


@app.command()
def gpu(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoint; may be repeated. Without, random ViT-B-32 and ViT-L-14."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="May be repeated. Without, 1, 2, 4 ... 256 pictures and 1, 32, 256 texts."
        ),
    ] = None,
    runner: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of names, such as '*-cuda:*'; may be repeated."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="The median of so many is taken.")] = 9,
    budget: Annotated[
        float, typer.Option(metavar="SECONDS", help="After which nothing new is started.")
    ] = 540.0,
    output: Annotated[Path, typer.Option(help="JSON file, whole after every row.")] = Path(
        "build/gpu/report.json"
    ),
    as_json: Json = False,
) -> None:
    """Export, judge and time whatever this machine has for its NVIDIA GPU, and the GPU itself."""
    absent = [name for name in _GPU_NEEDS if find_spec(name) is None]
    if absent:
        raise RunnerError(
            f"`python -m benchmarks gpu` needs the packages {', '.join(absent)}; "
            "pip install -e '.[export]', or put their wheels on PYTHONPATH"
        )
    from benchmarks.gpu import measure
    from benchmarks.gpu_report import Plan, tables
    from benchmarks.limits import require

    require("cuda")
    plan = Plan(batches=batch or (), rounds=rounds, budget=budget)
    plan = replace(plan, models=model or plan.models, runners=runner or plan.runners)
    with steps("loading") as progress:
        report = measure(plan, output, progress)
    log.print(f"wrote {output}")
    if as_json:
        print(json.dumps(json.loads(report.to_json())))
        return
    for table in tables(report):
        out.print(table)
    for reason in dict.fromkeys(left.reason for left in report.left_out):
        names = "; ".join(left.what for left in report.left_out if left.reason == reason)
        out.print(f"left out: {names}: {reason}", markup=False, highlight=False)


def _finish(document: Mapping[str, object], output: Path | None, as_json: bool) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(document, indent=2) + "\n")
        log.print(f"wrote {output}")
    if as_json:
        print(json.dumps(document))


if __name__ == "__main__":
    run(app)
