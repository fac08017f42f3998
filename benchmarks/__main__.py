"""Measure the runners of a bundle: their latency, their accuracy, and a server under load."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from serving.bundles.bundle import Bundle
from serving.cli.console import Json, document, note, progress, result, run
from serving.errors import RunnerError
from serving.util.extras import require
from serving.util.results import FILE, AccuracyRun, Device, LoadRun, Results

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

RESULTS = Path("build/benchmarks")

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Directory that `clip-deploy export` made.")
]
Output = Annotated[
    Path, typer.Option(help=f"Directory of {FILE}; what other commands put there is kept.")
]
Runners = Annotated[
    list[str] | None,
    typer.Option("--runner", help="Pattern of names, such as 'openvino:*'; may be repeated."),
]


@app.command()
def latency(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A bundle; or a checkpoint as `clip-deploy export` takes it, for PyTorch's "
            "runners and peers alone.",
        ),
    ] = "random:ViT-B-32",
    device: Annotated[
        Device, typer.Option(help="cuda: runners on an NVIDIA GPU, in turns with eager fp32 there.")
    ] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="Every batch, length and runner.")] = False,
    runner: Runners = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Time for one runner on one batch, about."),
    ] = None,
    stop_after: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Start nothing new after this time."),
    ] = None,
    output: Output = RESULTS,
    as_json: Json = False,
) -> None:
    """Time runners, peers, stages and loading in turns with eager float32, by pytest-benchmark."""
    require("the latency benchmark", "bench", "pytest_benchmark", "torch")
    from benchmarks.machine.limits import require as require_device
    from benchmarks.report.analysis import disturbed
    from benchmarks.report.tables import latency_table

    require_device(device)
    if (Path(model) / "manifest.json").exists():
        Bundle.open(Path(model))
    if Path(model).exists():
        model = str(Path(model).resolve())
    suite = Path(__file__).parent / "latency"
    before = (output / FILE).stat().st_mtime_ns if (output / FILE).exists() else None
    command = [sys.executable, "-m", "pytest", str(suite), "-v", "-p", "no:cacheprovider"]
    command += ["--benchmark-enable", "--benchmark-only", "--benchmark-quiet"]
    command += ["--model", model, "--device", device, "--results", str(output.resolve())]
    command += ["--full"] if full else []
    command += [f"--runners={pattern}" for pattern in runner or []]
    command += [f"--budget={budget}"] if budget is not None else []
    command += [f"--stop-after={stop_after}"] if stop_after is not None else []
    done = subprocess.run(command, stdout=sys.stderr, cwd=suite.parents[1], check=False)
    if not (output / FILE).exists() or (output / FILE).stat().st_mtime_ns == before:
        raise RunnerError(
            f"nothing was measured (pytest ended with {done.returncode}); what failed is named "
            f"above, and {output / FILE} was not touched"
        )
    note(f"wrote {output / FILE}")
    found = Results.read(output).latency[-1]
    if as_json:
        document(found)
    else:
        result(latency_table(found))
    if warning := disturbed(found):
        note(warning, "yellow")
    if done.returncode:
        raise RunnerError(f"not all could be measured: see above; {output / FILE} holds the rest")


@app.command()
def load(
    bundle: BundlePath,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer loads, shorter windows: about two minutes.")
    ] = False,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Requests in flight; may be repeated."),
    ] = None,
    runner: Annotated[str, typer.Option(help="As `clip-deploy assemble` takes it.")] = "auto",
    url: Annotated[
        str | None, typer.Option(help="grpc://host:port of a running server of BUNDLE.")
    ] = None,
    http_url: Annotated[
        str | None, typer.Option(help="http://host:port of the same running server.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="CLIP_ADMIN_KEY",
            help="Key of the running server's statistics; better given by the variable.",
        ),
    ] = None,
    repository: Annotated[
        Path, typer.Option(help="Model repository to write, without --url.")
    ] = Path("build/benchmark_repository"),
    output: Output = RESULTS,
    as_json: Json = False,
) -> None:
    """Put load on Triton by perf_analyzer and an asyncio client, and against eager float32."""
    from benchmarks.load.measure import measure_embedded, measure_running, urls_of
    from benchmarks.load.plan import Plan
    from benchmarks.report.tables import load_remarks, load_table

    plan = (Plan.quick if quick else Plan.full)(concurrency or ())
    opened, urls = Bundle.open(bundle), urls_of(url, http_url)
    with progress("loading") as show:
        if urls:
            measured = measure_running(opened, plan, urls, show, admin_key)
        else:
            measured = measure_embedded(opened, plan, repository, runner, show)
    _keep(output, measured, as_json)
    if not as_json:
        result(load_table(measured))
        for line in load_remarks(measured):
            result(line)


@app.command()
def accuracy(
    bundle: BundlePath,
    images: Annotated[
        Path,
        typer.Argument(
            help="Directory of labelled images: DIR/label/*.jpg, or flat with captions.txt."
        ),
    ],
    templates: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A prompt template a line, with a {}, or openai-7; default: the checkpoint's own.",
        ),
    ] = None,
    runner: Runners = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most images, taken evenly over the directory.")
    ] = None,
    output: Output = RESULTS,
    as_json: Json = False,
) -> None:
    """Zero-shot top-1 and top-5 of every runner on labelled images, against eager float32."""
    from benchmarks.accuracy.measure import accuracy as measure
    from benchmarks.report.tables import accuracy_remarks, accuracy_table
    from serving.tasks.zero_shot import read_templates

    opened = Bundle.open(bundle)
    prompts = read_templates(templates) if templates else None
    with progress("loading") as show:
        measured = measure(
            opened, images, show, templates=prompts, patterns=runner or ["*"], limit=limit
        )
    _keep(output, measured, as_json)
    if not as_json:
        result(accuracy_table(measured))
        for line in accuracy_remarks(measured):
            result(line)


@app.command()
def report(
    directory: Annotated[
        Path, typer.Argument(help=f"Holds {FILE}; gets RESULTS.md and the plots.")
    ] = RESULTS,
    readme: Annotated[
        Path | None, typer.Option(help="Markdown file whose marked part is written anew.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the results as Markdown and plots."""
    from benchmarks.report.markdown import write_report

    written = write_report(directory, readme)
    for path in written:
        note(f"wrote {path}")
    if as_json:
        document({"written": [str(path) for path in written]})


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help=f"A {FILE}, or its directory.")],
    new: Annotated[Path, typer.Argument(help="The same.")],
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a ratio that may be lost.")
    ] = 0.15,
    as_json: Json = False,
) -> None:
    """Show what changed beyond noise; exit code 1 when something became slower than allowed."""
    from benchmarks.report.compare import compare as measure
    from benchmarks.report.tables import comparison_table

    found = measure(old, new, threshold)
    for warning in found.warnings:
        note(warning, "yellow")
    if as_json:
        document(found)
    else:
        result(comparison_table(found))
    if found.slower:
        raise typer.Exit(1)


def _keep(output: Path, measured: LoadRun | AccuracyRun, as_json: bool) -> None:
    """Put a section into the results of a directory."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / FILE
    results = Results.read(file) if file.exists() else Results()
    if isinstance(measured, LoadRun):
        results = dataclasses.replace(results, load=measured)
    else:
        results = dataclasses.replace(results, accuracy=measured)
    results.write(file)
    note(f"wrote {file}")
    if as_json:
        document(measured)


if __name__ == "__main__":
    run(app)
