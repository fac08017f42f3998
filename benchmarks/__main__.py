"""`python -m benchmarks`: how fast the runners of a bundle are, alone and served."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from serving.bundles.bundle import Bundle
from serving.cli.console import Json, log, out, run, steps
from serving.errors import RunnerError
from serving.util.files import write_text

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Directory that `python -m export` made.")
]
Output = Annotated[Path | None, typer.Option(help="JSON file to write as well.")]

RESULTS = Path("build/benchmarks")

_GPU_NEEDS = ("torch", "PIL", "tokenizers", "ftfy", "safetensors", "huggingface_hub")
"""Imported by `benchmarks.gpu` at once; what else an export or a runner needs may be absent, and is
then named beside what was left out."""


@app.command()
def latency(
    bundle: BundlePath,
    full: Annotated[bool, typer.Option("--full", help="Every batch, length and runner.")] = False,
    runner: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of names, such as 'openvino:*'; may be repeated."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="That a runner is timed for on one batch, about."),
    ] = None,
    output: Annotated[Path, typer.Option(help="pytest-benchmark's JSON.")] = RESULTS
    / "latency.json",
    as_json: Json = False,
) -> None:
    """Time runners, peers, stages and loading in turns with eager float32, by pytest-benchmark."""
    Bundle.open(bundle)
    folder = Path(__file__).parent / "latency"
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    command = [sys.executable, "-m", "pytest", str(folder), "-v", "-p", "no:cacheprovider"]
    command += ["--benchmark-enable", "--benchmark-only", "--benchmark-quiet"]
    command += [f"--benchmark-json={temporary}", "--bundle", str(bundle.resolve())]
    command += ["--full"] if full else []
    command += [f"--runners={pattern}" for pattern in runner or []]
    command += [f"--budget={budget}"] if budget is not None else []
    done = subprocess.run(command, stdout=sys.stderr, cwd=folder.parents[1], check=False)
    if not temporary.exists() or not temporary.stat().st_size:
        temporary.unlink(missing_ok=True)
        raise RunnerError(
            f"nothing was measured (pytest ended with {done.returncode}); what failed is named "
            f"above, and {output} was not touched"
        )
    temporary.replace(output)
    from benchmarks.report.results import Latency
    from benchmarks.report.sections import summary

    log.print(f"wrote {output}")
    found = Latency(output)
    if as_json:
        print(json.dumps(found.document))
    else:
        out.print(summary(found))
    if warning := found.disturbed():
        log.print(f"[yellow]{warning}[/]")
    if done.returncode:
        raise RunnerError(f"not all could be measured: see above; {output} holds the rest")


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="Holds latency.json, served.json, accuracy.json; gets the plots.")
    ] = RESULTS,
    output: Annotated[
        Path | None, typer.Option(help="Markdown to write; default: FOLDER/RESULTS.md.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Markdown file whose marked part is written anew.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Results in words and pictures."""
    from benchmarks.report.markdown import write_report

    written = write_report(folder, output or folder / "RESULTS.md", readme)
    for path in written:
        log.print(f"wrote {path}")
    if as_json:
        print(json.dumps({"written": [str(path) for path in written]}))


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A latency.json, or the folder of one.")],
    new: Annotated[Path, typer.Argument(help="The same.")],
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="A ratio may lose this share.")
    ] = 0.15,
    as_json: Json = False,
) -> None:
    """What changed beyond noise; exits with 1 when something became slower by the threshold."""
    from benchmarks.report.compare import compare as measure
    from benchmarks.report.compare import table

    found = measure(old, new, threshold)
    for warning in found.warnings:
        log.print(f"[yellow]{warning}[/]")
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        out.print(table(found))
    if found.slower:
        raise typer.Exit(1)


@app.command()
def served(
    bundle: BundlePath,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer loads, shorter windows: about two minutes.")
    ] = False,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Requests under way at a time; may be repeated."),
    ] = None,
    runner: Annotated[str, typer.Option(help="As `python -m serving assemble` takes it.")] = "auto",
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
            help="Of the running server, whose statistics are read; better given by the variable.",
        ),
    ] = None,
    repository: Annotated[Path, typer.Option()] = Path("build/benchmark_repository"),
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Put load on Triton by perf_analyzer and an asyncio client, and against eager float32."""
    from benchmarks.load.report import Plan, remarks, table
    from benchmarks.load.served import measure_embedded, measure_running, urls_of

    plan = (Plan.quick if quick else Plan.full)(concurrency or ())
    opened, urls = Bundle.open(bundle), urls_of(url, http_url)
    with steps("loading") as progress:
        if urls:
            report = measure_running(opened, plan, urls, progress, admin_key)
        else:
            report = measure_embedded(opened, plan, repository, runner, progress)
    _finish(asdict(report), output, as_json)
    if not as_json:
        out.print(table(report))
        for line in remarks(report):
            out.print(line, markup=False, highlight=False)


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
    from benchmarks.machine.limits import require

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


@app.command()
def accuracy(
    bundle: BundlePath,
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="DIR/LABEL/*.jpg, or captions.txt (`file, label`)."),
    ],
    templates: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A template a line, with a {}, or openai-7; default: the checkpoint's own.",
        ),
    ] = None,
    runner: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of names, such as 'openvino:*'; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most pictures, taken evenly over the folder.")
    ] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Zero-shot top-1 and top-5 of every runner on labelled pictures, against eager float32."""
    from benchmarks.accuracy.measure import accuracy as measure
    from benchmarks.accuracy.report import table
    from benchmarks.machine.environment import environment
    from serving.tasks.zero_shot import read_templates

    opened = Bundle.open(bundle)
    prompts = read_templates(templates) if templates else None
    with steps("loading") as progress:
        result = measure(
            opened, folder, progress, templates=prompts, patterns=runner or ["*"], limit=limit
        )
    manifest = opened.manifest
    document = {
        "environment": environment(),
        "bundle": manifest.name,
        "weights": manifest.provenance.weights,
        "folder": folder.name,
        **asdict(result),
    }
    _finish(document, output, as_json)
    if as_json:
        return
    out.print(table(result, f"{manifest.name} on {folder.name}"))
    for note in result.remarks():
        out.print(note, markup=False, highlight=False)


def _finish(document: Mapping[str, object], output: Path | None, as_json: bool) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(document, indent=2) + "\n")
        log.print(f"wrote {output}")
    if as_json:
        print(json.dumps(document))


if __name__ == "__main__":
    run(app)
