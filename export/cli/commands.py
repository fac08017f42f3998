"""Commands of `python -m export`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from export.cli.documents import ExportedBundle
from export.int8 import Method
from export.precisions import DEFAULT_PRECISIONS, Precision
from serving.bundles.bundle import Bundle
from serving.bundles.engine_facts import Library
from serving.cli.console import Cell, Json, document, note, progress, result, styled, table
from serving.errors import InputError
from serving.util.extras import require
from serving.util.files import check_directory, check_replaceable

MANIFEST = "manifest.json"
_EXPORT = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "huggingface_hub")
"""Modules installed by the extra `export`."""

EngineLibrary = Annotated[
    Library,
    typer.Option(
        "--engine",
        help="Library to build with. tensorrt builds for the GPU of this machine; tensorrt-rtx "
        "needs no GPU.",
    ),
]

LabeledDirectory = Annotated[
    Path | None,
    typer.Option(
        help="Directory of labeled images. Adds zero-shot accuracy to the parity gate. Its "
        "captions.txt has one `file, label` per line."
    ),
]


def bundle(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint to export: a name such as ViT-B/32, a Hugging Face id such as "
            "openai/clip-vit-base-patch32, a directory, a weights file, or random:ViT-B-32 for "
            "random weights. `clip-deploy list` shows the known names."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Directory to write the bundle to. Default: artifacts/<name>."),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="Tokenizer of a checkpoint that has none: OpenAI's bpe_simple_vocab_16e6.txt.gz "
            "or a tokenizer.json.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hugging Face id. Default: the main branch."),
    ] = None,
    activation: Annotated[
        Literal["quick_gelu", "gelu"] | None,
        typer.Option(help="Activation function of a weights file that has no configuration."),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Precision to export in addition to fp32. Can be repeated. Default: fp16 and int8."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Directory of representative images. INT8 activation ranges are measured on them."
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 file of representative texts, one per line. INT8 activation ranges are "
            "measured on them."
        ),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Method that chooses INT8 activation ranges.")
    ] = "percentile",
    torchscript: Annotated[
        bool, typer.Option("--torchscript", help="Also trace both towers to TorchScript, in fp32.")
    ] = False,
    prefix_tree: Annotated[
        bool,
        typer.Option(
            "--prefix-tree",
            help="Also export prefix-tree graphs of the text tower, in fp32 and int8. They compute "
            "a shared prefix of several texts only once: a label set on a CPU needs 3.7 tokens per "
            "prompt instead of 9.5. The bundle then has another copy of the text tower's weights.",
        ),
    ] = False,
    labelled: LabeledDirectory = None,
    library: Annotated[
        Library | None,
        typer.Option(
            "--engine",
            help="Also build engines with this library, with the defaults of `clip-deploy engine`.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle of verified graphs."""
    require("export", "export", *_EXPORT)
    from export.checkpoints.load import at_revision, load_checkpoint
    from export.pipeline import Options, build

    if revision is not None:
        checkpoint = at_revision(checkpoint, revision)
    if output is not None:
        check_replaceable(output, MANIFEST)
    with progress(f"loading {checkpoint}") as show:
        loaded = load_checkpoint(checkpoint, vocabulary=vocabulary, activation=activation)
        written = build(
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
        show(f"wrote {written.path}")
        if library is not None:
            from export.engines.builder import EngineOptions
            from export.engines.bundle_engines import add_engines, buildable

            options = EngineOptions(library=library)
            written = add_engines(written, buildable(written), options, show)
    _report(written, as_json)


def engine(
    path: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE", help="Bundle directory written by `clip-deploy export`."),
    ],
    library: EngineLibrary = "tensorrt",
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Precision of the graphs to build engines from. Can be repeated. Default: fp16, "
            "and int8-fp16 or else int8."
        ),
    ] = None,
    max_batch_size: Annotated[
        int, typer.Option(min=1, help="Maximum batch size of an engine.")
    ] = 64,
    workspace_gb: Annotated[
        float, typer.Option(min=0.1, help="Maximum scratch memory of a kernel, in GiB.")
    ] = 4,
    optimization_level: Annotated[
        int,
        typer.Option(
            min=0,
            max=5,
            help="Effort of the search for fast kernels: 0 builds fastest, 5 searches longest.",
        ),
    ] = 3,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Build engines that later versions with the same major version also load.",
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="Build engines that run on any GPU of the Ampere generation or later.",
        ),
    ] = False,
    strip_weights: Annotated[
        bool,
        typer.Option(
            "--strip-weights",
            help="Write small engines without weights. The weights are read from the graph when an "
            "engine is loaded.",
        ),
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps measured kernel times between builds. Default: one file per "
            "device under ~/.cache/clip-deploy."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build TensorRT engines from a bundle's graphs, run the parity gate, and add them to it."""
    require("engine", "export", "onnxruntime")
    from export.engines.builder import EngineOptions
    from export.engines.bundle_engines import add_engines, buildable

    if Precision.INT8_DYNAMIC in (precision or ()):
        raise InputError(
            "engines are built from fp32, fp16, int8 and int8-fp16 graphs, not from int8-dynamic",
            advice="choose another --precision",
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
        check_directory(opened.path)
        extended = add_engines(opened, precision or buildable(opened), options, show)
    _report(extended, as_json)


def list_models(as_json: Json = False) -> None:
    """List known checkpoints with their sizes and the source of their weights."""
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
    listing = table("Known checkpoints", columns, rows)
    listing.columns[0].no_wrap = True  # users copy these names
    result(listing)
    result(
        "`clip-deploy export` also takes any Hugging Face id of a CLIP model, any local directory "
        "or weights file, and, to measure latency, seeded random weights: "
        f"random:{', random:'.join(ARCHITECTURES)}"
    )


def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE", help="Bundle directory written by `clip-deploy export`."),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint that the bundle was exported from. Default: the source in its "
            "manifest."
        ),
    ] = None,
    labelled: LabeledDirectory = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's files and graphs, and run the parity gate again on this machine."""
    require("verify", "export", *_EXPORT)
    from export.gate.verify import verify as verify_bundle

    with progress(f"verifying {path}") as show:
        verified = verify_bundle(Bundle.open(path), checkpoint, labelled, show)
    _report(verified, as_json)


def _report(bundle: Bundle, as_json: bool) -> None:
    failed = [
        f"{artifact.file} by {verdict.runner}" + (f" ({verdict.reason})" if verdict.reason else "")
        for artifact in bundle.manifest.artifacts
        for verdict in artifact.verdicts
        if not verdict.passed
    ]
    if as_json:
        document(ExportedBundle(path=str(bundle.path), manifest=bundle.manifest))
    else:
        title = f"{bundle.path}  ({bundle.manifest.architecture})"
        columns = ("artifact", ">MB", "runner", ">cosine min", ">mean", ">top-1", ">accuracy")
        result(table(title, (*columns, "verdict"), _rows(bundle)))
    if failed:
        note(f"failed the parity gate: {', '.join(failed)}", "yellow")
    # An engine that cannot run on this machine has no verdict. It is not served until it has one.
    required = [a for a in bundle.manifest.artifacts if a.verdicts or a.kind != "engine"]
    if not all(any(v.passed for v in a.verdicts) for a in required):
        sys.exit(1)


def _rows(bundle: Bundle) -> Iterator[tuple[Cell, ...]]:
    for artifact in bundle.manifest.artifacts:
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
                styled(("passed", "green") if v.passed else ("failed", "red")),
            )
        if not artifact.verdicts:
            yield name, size, "", "", "", "", "", "not run here"


def doctor(as_json: Json = False) -> None:
    """Show what this machine can build and run, and how to install what is missing."""
    from export.cli.doctor_table import tables
    from export.doctor.report import examine

    report = examine()
    if as_json:
        document(report)
        return
    for section in tables(report):
        result(section)


def add_commands(app: typer.Typer, bundle_name: str) -> None:
    """Add every command of this package to `app`.

    Args:
        app: the program to extend.
        bundle_name: name of the command `bundle` in it.
    """
    app.command(bundle_name)(bundle)
    for command in (engine, verify, doctor):
        app.command()(command)
    app.command("list")(list_models)
