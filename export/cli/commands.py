"""The commands of `python -m export`: from a checkpoint to a verified bundle."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from export.int8 import Method
from export.kinds import DEFAULT_KINDS, Kind, Library
from serving.bundles.bundle import Bundle
from serving.cli.console import Json, log, out, steps
from serving.errors import InputError
from serving.util.extras import require

_EXPORT = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "huggingface_hub")
"""Modules that the extra `export` brings."""

EngineLibrary = Annotated[
    Library,
    typer.Option("--engine", help="tensorrt needs the GPU it builds for; tensorrt-rtx needs none."),
]

LabelledFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of pictures with captions.txt (`file, label`), for the gate."),
]


def bundle(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="random:ViT-B-32, ViT-B/32, openai/clip-vit-base-patch32, a directory or a file"
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Directory of the bundle; default artifacts/<name>.")
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="bpe_simple_vocab_16e6.txt.gz or tokenizer.json, for weights that bring none.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    activation: Annotated[
        Literal["quick_gelu", "gelu"] | None,
        typer.Option(help="Of a bare weights file, which does not say."),
    ] = None,
    precision: Annotated[
        list[Kind] | None,
        typer.Option(help="What to make beside fp32; may be repeated. Default: fp16 and int8."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures like those to come, for INT8 ranges."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="UTF-8 file of texts like those to come, a line each, likewise."),
    ] = None,
    method: Annotated[Method, typer.Option(help="How INT8 ranges are chosen.")] = "percentile",
    text_tree: Annotated[
        bool,
        typer.Option(
            "--text-tree",
            help="Make text graphs too that compute beginnings which texts share once, in fp32 and "
            "int8: label sets on CPUs need 3.7 tokens a prompt instead of 9.5, the bundle a second "
            "copy of the text tower's weights.",
        ),
    ] = False,
    labelled: LabelledFolder = None,
    library: Annotated[
        Library | None,
        typer.Option("--engine", help="Build plans too, as `python -m export engine` does."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle of verified graphs."""
    require("export", "export", *_EXPORT)
    from export.checkpoints.load import load_checkpoint
    from export.pipeline import Options, build

    with steps(f"loading {checkpoint}") as progress:
        loaded = load_checkpoint(checkpoint, vocabulary=vocabulary, activation=activation)
        made = build(
            loaded,
            output or Path("artifacts") / loaded.name,
            progress,
            Options(
                kinds=precision or DEFAULT_KINDS,
                method=method,
                pictures=calibration,
                captions=captions,
                labelled=labelled,
                text_tree=text_tree,
            ),
        )
        progress(f"wrote {made.path}")
        if library is not None:
            from export.engines.builder import EngineOptions
            from export.engines.bundle_engines import add_engines, buildable

            options = EngineOptions(library=library.value)
            made = add_engines(made, buildable(made), options, progress)
    _report(made, as_json)


def engine(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of a bundle.")],
    library: EngineLibrary = Library.TENSORRT,
    precision: Annotated[
        list[Kind] | None,
        typer.Option(
            help="Of the graphs to build; may be repeated. Default: fp16, and int8-fp16 or int8."
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch of a plan.")] = 64,
    workspace_gb: Annotated[
        float, typer.Option(min=0.1, help="Scratch memory a kernel may ask for.")
    ] = 4,
    optimization_level: Annotated[
        int, typer.Option(min=0, max=5, help="0 builds fastest, 5 searches longest.")
    ] = 3,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="For later versions of the same major.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="For any GPU from Ampere on.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Small plans, filled from the graph on loading.")
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File of kernel times; default one a device under ~/.cache/clip-deploy."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build plans of a bundle's graphs for this machine's GPU, judge them, and record them."""
    require("engine", "export", "onnxruntime")
    from export.engines.builder import EngineOptions
    from export.engines.bundle_engines import add_engines, buildable

    if unbuildable := sorted(set(precision or ()) & {Kind.INT8_DYNAMIC, Kind.TORCHSCRIPT}):
        raise InputError(
            "plans are built of fp32, fp16, int8 and int8-fp16 graphs, not of "
            + ", ".join(unbuildable)
        )
    options = EngineOptions(
        library=library.value,
        max_batch=max_batch,
        workspace_bytes=int(workspace_gb * (1 << 30)),
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
    )
    with steps(f"reading {path}") as progress:
        opened = Bundle.open(path)
        made = add_engines(opened, precision or buildable(opened), options, progress)
    _report(made, as_json)


def list_models(as_json: Json = False) -> None:
    """Known checkpoints: name, sizes, and where the weights come from."""
    require("the list of checkpoints", "export", *_EXPORT)
    from export.checkpoints.architectures import ARCHITECTURES, KNOWN_MODELS

    if as_json:
        models = [asdict(model) for model in KNOWN_MODELS]
        architectures = {name: asdict(config) for name, config in ARCHITECTURES.items()}
        print(json.dumps({"models": models, "architectures": architectures}))
        return
    from export.pipeline import count_parameters

    table = Table(title="Known checkpoints")
    table.add_column("checkpoint", no_wrap=True)  # whole, to be copied
    for column in ("image", "parameters", "dim", "source"):
        table.add_column(column, justify="right" if column in ("parameters", "dim") else "left")
    for model in KNOWN_MODELS:
        config = ARCHITECTURES[model.architecture]
        source = "hub" if model.source == model.name else model.source.split("/")[2]
        parameters = f"{count_parameters(config) / 1e6:.0f} M"
        size = f"{model.architecture}, {config.image.image_size} px"
        table.add_row(model.name, size, parameters, str(config.embed_dim), source)
    out.print(table)
    out.print(
        "Any Hugging Face id of a CLIP works, any local directory or file, and seeded random "
        f"weights for latency work: random:{', random:'.join(ARCHITECTURES)}"
    )


def verify(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of a bundle.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="The checkpoint it was made from; default: what its manifest says."),
    ] = None,
    labelled: LabelledFolder = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's files and graphs, and run the gate again on this machine."""
    require("verify", "export", *_EXPORT)
    from export.gate.verify import verify as verify_bundle

    with steps(f"verifying {path}") as progress:
        verified = verify_bundle(Bundle.open(path), checkpoint, labelled, progress)
    _report(verified, as_json)


def _report(made: Bundle, as_json: bool) -> None:
    refused = [
        f"{artifact.file} by {verdict.runner}"
        for artifact in made.manifest.artifacts
        for verdict in artifact.verdicts
        if not verdict.passed
    ]
    if as_json:
        print(json.dumps({"path": str(made.path), **json.loads(made.manifest.to_json())}))
    else:
        out.print(_table(made))
    if refused:
        log.print(f"[yellow]the gate refused {', '.join(refused)}[/]")
    # A plan has no verdict where it cannot be run, and is not served before it has one.
    judged = [a for a in made.manifest.artifacts if a.verdicts or a.kind != "plan"]
    if not all(any(v.passed for v in a.verdicts) for a in judged):
        sys.exit(1)


def _table(made: Bundle) -> Table:
    table = Table(title=f"{made.path}  ({made.manifest.architecture})")
    for column in (
        "artifact",
        "MB",
        "runner",
        "cosine min",
        "mean",
        "top-1",
        "accuracy",
        "verdict",
    ):
        table.add_column(column, overflow="fold")
    for artifact in made.manifest.artifacts:
        size = f"{sum(file.bytes for file in artifact.files) / 1e6:.1f}"
        plan = artifact.quantisation
        left_out = f" ({len(plan.excluded)} of {plan.layers} layers left out)" if plan else ""
        for index, v in enumerate(artifact.verdicts):
            table.add_row(
                "" if index else artifact.file + (left_out if plan and plan.excluded else ""),
                "" if index else size,
                v.runner,
                f"{v.min_cosine:.6f}",
                f"{v.mean_cosine:.6f}",
                "" if v.top1_agreement is None else f"{v.top1_agreement:.1%}",
                "" if v.relative_accuracy is None else f"{v.relative_accuracy:.2%} of fp32",
                "[green]passed[/]" if v.passed else "[red]refused[/]",
            )
        if not artifact.verdicts:
            table.add_row(artifact.file, size, "", "", "", "", "", "not run here")
    return table


def doctor(as_json: Json = False) -> None:
    """What this machine has, what can be built and served with it, and what mends the rest."""
    from export.cli.doctor_table import tables
    from export.doctor.report import examine

    report = examine()
    if as_json:
        print(json.dumps(asdict(report)))
        return
    for table in tables(report):
        out.print(table)


def add_commands(app: typer.Typer, bundle_name: str) -> None:
    """Add every command of this package to `app`; `bundle` is called `bundle_name` there."""
    app.command(bundle_name)(bundle)
    for command in (engine, verify, doctor):
        app.command()(command)
    app.command("list")(list_models)
