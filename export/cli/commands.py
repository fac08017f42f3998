"""The commands of `python -m export`: from a checkpoint to a verified bundle."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from export.cli.documents import ExportedBundle
from export.int8 import Method
from export.precisions import DEFAULT_PRECISIONS, Precision
from serving.bundles.bundle import Bundle
from serving.bundles.engine_facts import Library
from serving.cli.console import Cell, Json, document, note, progress, result, table
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
        list[Precision] | None,
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
    torchscript: Annotated[
        bool, typer.Option("--torchscript", help="Trace both towers to TorchScript too, in fp32.")
    ] = False,
    prefix_tree: Annotated[
        bool,
        typer.Option(
            "--prefix-tree",
            help="Make text graphs too that compute beginnings which texts share once, in fp32 and "
            "int8: label sets on CPUs need 3.7 tokens a prompt instead of 9.5, the bundle a second "
            "copy of the text tower's weights.",
        ),
    ] = False,
    labelled: LabelledFolder = None,
    library: Annotated[
        Library | None,
        typer.Option("--engine", help="Build plans too, as `clip-deploy engine` does."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle of verified graphs."""
    require("export", "export", *_EXPORT)
    from export.checkpoints.load import load_checkpoint
    from export.pipeline import Options, build

    with progress(f"loading {checkpoint}") as show:
        loaded = load_checkpoint(checkpoint, vocabulary=vocabulary, activation=activation)
        made = build(
            loaded,
            output or Path("artifacts") / loaded.name,
            show,
            Options(
                precisions=precision or DEFAULT_PRECISIONS,
                method=method,
                pictures=calibration,
                captions=captions,
                labelled=labelled,
                torchscript=torchscript,
                prefix_tree=prefix_tree,
            ),
        )
        show(f"wrote {made.path}")
        if library is not None:
            from export.engines.builder import EngineOptions
            from export.engines.bundle_engines import add_engines, buildable

            options = EngineOptions(library=library)
            made = add_engines(made, buildable(made), options, show)
    _report(made, as_json)


def engine(
    path: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Directory that `clip-deploy export` wrote.")
    ],
    library: EngineLibrary = "tensorrt",
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Of the graphs to build; may be repeated. Default: fp16, and int8-fp16 or int8."
        ),
    ] = None,
    max_batch_size: Annotated[
        int, typer.Option(min=1, help="Largest batch that an engine takes.")
    ] = 64,
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

    if Precision.INT8_DYNAMIC in (precision or ()):
        raise InputError(
            "engines are built from fp32, fp16, int8 and int8-fp16 graphs, not from int8-dynamic"
        )
    options = EngineOptions(
        library=library,
        max_batch=max_batch_size,
        workspace_bytes=int(workspace_gb * (1 << 30)),
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
    )
    with progress(f"reading {path}") as show:
        opened = Bundle.open(path)
        made = add_engines(opened, precision or buildable(opened), options, show)
    _report(made, as_json)


def list_models(as_json: Json = False) -> None:
    """Known checkpoints: name, sizes, and where the weights come from."""
    require("the list of checkpoints", "export", *_EXPORT)
    from export.checkpoints.architectures import ARCHITECTURES, KNOWN_MODELS, KnownCheckpoints

    if as_json:
        document(KnownCheckpoints(models=KNOWN_MODELS, architectures=ARCHITECTURES))
        return
    from export.pipeline import count_parameters

    rows = []
    for model in KNOWN_MODELS:
        config = ARCHITECTURES[model.architecture]
        rows.append(
            (
                model.name,
                f"{model.architecture}, {config.image.image_size} px",
                f"{count_parameters(config) / 1e6:.0f} M",
                str(config.embed_dim),
                "hub" if model.source == model.name else model.source.split("/")[2],
            )
        )
    columns = ("checkpoint", "image", ">parameters", ">dim", "source")
    made = table("Known checkpoints", columns, rows)
    made.columns[0].no_wrap = True  # to be copied whole
    result(made)
    result(
        "Any Hugging Face id of a CLIP works, any local directory or file, and seeded random "
        f"weights for latency work: random:{', random:'.join(ARCHITECTURES)}"
    )


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Directory that `clip-deploy export` wrote.")
    ],
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

    with progress(f"verifying {path}") as show:
        verified = verify_bundle(Bundle.open(path), checkpoint, labelled, show)
    _report(verified, as_json)


def _report(made: Bundle, as_json: bool) -> None:
    failed = [
        f"{artifact.file} by {verdict.runner}"
        for artifact in made.manifest.artifacts
        for verdict in artifact.verdicts
        if not verdict.passed
    ]
    if as_json:
        document(ExportedBundle(path=str(made.path), manifest=made.manifest))
    else:
        title = f"{made.path}  ({made.manifest.architecture})"
        columns = ("artifact", ">MB", "runner", ">cosine min", ">mean", ">top-1", ">accuracy")
        result(table(title, (*columns, "verdict"), _rows(made)))
    if failed:
        note(f"the parity gate failed {', '.join(failed)}", "yellow")
    # An engine has no verdict where it cannot be run, and is not served before it has one.
    judged = [a for a in made.manifest.artifacts if a.verdicts or a.kind != "engine"]
    if not all(any(v.passed for v in a.verdicts) for a in judged):
        sys.exit(1)


def _rows(made: Bundle) -> Iterator[tuple[Cell, ...]]:
    for artifact in made.manifest.artifacts:
        size = f"{sum(file.bytes for file in artifact.files) / 1e6:.1f}"
        int8 = artifact.quantisation
        excluded = len(int8.excluded) if int8 else 0
        name = artifact.file
        if int8 and excluded:
            name += f" ({excluded} of {int8.layers} layers left in floating point)"
        for index, v in enumerate(artifact.verdicts):
            yield (
                "" if index else name,
                "" if index else size,
                v.runner,
                f"{v.min_cosine:.6f}",
                f"{v.mean_cosine:.6f}",
                "" if v.top1_agreement is None else f"{v.top1_agreement:.1%}",
                "" if v.relative_accuracy is None else f"{v.relative_accuracy:.2%} of fp32",
                Text("passed", "green") if v.passed else Text("failed", "red"),
            )
        if not artifact.verdicts:
            yield name, size, "", "", "", "", "", "not run here"


def doctor(as_json: Json = False) -> None:
    """What this machine has, what can be built and served with it, and what mends the rest."""
    from export.cli.doctor_table import tables
    from export.doctor.report import examine

    report = examine()
    if as_json:
        document(report)
        return
    for made in tables(report):
        result(made)


def add_commands(app: typer.Typer, bundle_name: str) -> None:
    """Add every command of this package to `app`; `bundle` is called `bundle_name` there."""
    app.command(bundle_name)(bundle)
    for command in (engine, verify, doctor):
        app.command()(command)
    app.command("list")(list_models)
