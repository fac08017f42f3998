"""Measure latency, accuracy and server load of the runners of a bundle."""

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
from serving.util.files import check_directory
from serving.util.results import FILE, AccuracyRun, Device, LoadRun, Results

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

RESULTS = Path("build/benchmarks")

BundlePath = Annotated[
    Path,
    typer.Argument(metavar="BUNDLE", help="Directory of a bundle that `clip-deploy export` wrote."),
]
Output = Annotated[
    Path,
    typer.Option(
        help=f"Directory to write {FILE} to. Results of the other commands in that file are kept."
    ),
]
Runners = Annotated[
    list[str] | None,
    typer.Option(
        "--runner", help="Measure runners that match this pattern, e.g. 'openvino:*'. Repeatable."
    ),
]


@app.command()
def latency(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Bundle to measure. A checkpoint, as accepted by `clip-deploy export`, is "
            "measured with PyTorch's runners and peers only.",
        ),
    ] = "random:ViT-B-32",
    device: Annotated[
        Device,
        typer.Option(
            help="Device to measure on; cuda is an NVIDIA GPU. The reference is eager fp32 on it."
        ),
    ] = "cpu",
    full: Annotated[
        bool, typer.Option("--full", help="Measure every batch size, text length and runner.")
    ] = False,
    runner: Runners = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Approximate time per runner and batch."),
    ] = None,
    stop_after: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0, help="Start no further measurement after this time."
        ),
    ] = None,
    output: Output = RESULTS,
    as_json: Json = False,
) -> None:
    """Measure the latency of runners, peers and pipeline stages relative to eager float32."""
    require("the latency benchmark", "bench", "pytest_benchmark", "torch")
    from benchmarks.machine.limits import require as require_device
    from benchmarks.report.analysis import disturbed
    from benchmarks.report.tables import latency_table

    require_device(device)
    check_directory(output)
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
            f"nothing was measured (pytest exited with {done.returncode}), and {output / FILE} is "
            "unchanged",
            advice="see the failures above",
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
        raise RunnerError(
            f"some measurements failed; {output / FILE} contains the others",
            advice="see the failures above",
        )


@app.command()
def load(
    bundle: BundlePath,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Use fewer loads and shorter windows: about two minutes."),
    ] = False,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of requests in flight. Repeatable."),
    ] = None,
    runner: Annotated[
        str,
        typer.Option(
            help="Runner of the towers, as for `clip-deploy assemble`; auto: the fastest ones."
        ),
    ] = "auto",
    url: Annotated[
        str | None,
        typer.Option(help="Measure a running server of BUNDLE at grpc://host:port."),
    ] = None,
    http_url: Annotated[
        str | None,
        typer.Option(help="Measure a running server of BUNDLE at http://host:port."),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="CLIP_ADMIN_KEY",
            help="Administrative key of the running server, to read its statistics. Prefer the "
            "environment variable.",
        ),
    ] = None,
    repository: Annotated[
        Path,
        typer.Option(
            help="Directory to assemble the model repository in, without --url or --http-url."
        ),
    ] = Path("build/benchmark_repository"),
    output: Output = RESULTS,
    as_json: Json = False,
) -> None:
    """Measure Triton under load with perf_analyzer and an asyncio client, against eager fp32."""
    from benchmarks.load.measure import measure_embedded, measure_running, urls_of
    from benchmarks.load.plan import Plan
    from benchmarks.report.tables import load_remarks, load_table

    _old(output)
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
            metavar="DIR",
            help="Directory of labelled images: DIR/LABEL/*.jpg, or flat with captions.txt.",
        ),
    ],
    templates: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File with one prompt template per line, each with a {}; or openai-7. Default: "
            "the templates of the checkpoint.",
        ),
    ] = None,
    runner: Runners = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of images, spread evenly over the directory."),
    ] = None,
    output: Output = RESULTS,
    as_json: Json = False,
) -> None:
    """Measure zero-shot top-1 and top-5 accuracy of every runner on labelled images."""
    from benchmarks.accuracy.measure import accuracy as measure
    from benchmarks.report.tables import accuracy_remarks, accuracy_table
    from serving.tasks.zero_shot import read_templates

    _old(output)
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
        Path,
        typer.Argument(
            metavar="DIR",
            help=f"Directory with {FILE}. RESULTS.md and the plots are written to it.",
        ),
    ] = RESULTS,
    readme: Annotated[
        Path | None, typer.Option(help="Markdown file whose marked part is replaced.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the results as a Markdown report with plots."""
    from benchmarks.report.markdown import write_report

    written = write_report(directory, readme)
    for path in written:
        note(f"wrote {path}")
    if as_json:
        document({"written": [str(path) for path in written]})


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help=f"Older {FILE}, or its directory.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help=f"Newer {FILE}, or its directory.")],
    threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="Relative decrease of a speed ratio that is tolerated."),
    ] = 0.15,
    as_json: Json = False,
) -> None:
    """Show changes that exceed the noise; exit with 1 if something became slower than tolerated."""
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


def _old(output: Path) -> Results:
    """Return the results that are already in a directory.

    Raises:
        InputError: the directory cannot be written, or its results cannot be read.
    """
    check_directory(output)
    file = output / FILE
    return Results.read(file) if file.exists() else Results()


def _keep(output: Path, measured: LoadRun | AccuracyRun, as_json: bool) -> None:
    """Replace one section of the results file in a directory."""
    file, results = output / FILE, _old(output)
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
