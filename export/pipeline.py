"""Export of a checkpoint to a bundle.

The bundle is written to a temporary directory next to the output, which is then renamed.
"""

import contextlib
import datetime
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch

from export.checkpoints.architectures import OPENAI_MEAN, OPENAI_STD
from export.checkpoints.load import Checkpoint
from export.gate.datasets import Data
from export.gate.parity import Expected
from export.gate.verify import data_for, judged, references
from export.graphs.onnx_export import PROTOBUF_LIMIT, export_onnx, weights_bytes
from export.graphs.torchscript import export_torchscript
from export.int8 import Method
from export.int8.quantize import write_dynamic, write_int8
from export.precisions import DEFAULT_PRECISIONS, Precision
from export.towers.clip import (
    Clip,
    ClipConfig,
    ImageTower,
    ResNetConfig,
    TextTower,
    float16_overflow,
    for_inference,
    half_precision,
)
from export.towers.prefix_tree import PrefixTreeTower, in_trees
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import (
    MANIFEST_FORMAT,
    TOWER_OF,
    TOWERS,
    Artifact,
    Graph,
    Manifest,
    Provenance,
    Quantisation,
    Tower,
)
from serving.errors import InputError
from serving.util.files import new_directory, write_text
from serving.util.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of an export."""

    precisions: Sequence[Precision] = DEFAULT_PRECISIONS
    method: Method = "percentile"
    pictures: Path | None = None
    """Directory of calibration images for INT8."""
    captions: Path | None = None
    """Text file of calibration captions for INT8."""
    labelled: Path | None = None
    """Directory of labeled images for the parity gate."""
    torchscript: bool = False
    """Also trace both towers to TorchScript, in fp32."""
    prefix_tree: bool = False
    """Also export the prefix-tree graph, in fp32, and in int8 if `precisions` contains int8."""


@dataclass
class _Work:
    """State of an export in progress."""

    checkpoint: Checkpoint
    directory: Path
    options: Options
    data: Data
    progress: Progress
    references: dict[Tower, Expected]


def build(
    checkpoint: Checkpoint,
    output: Path,
    progress: Progress,
    options: Options | None = None,
) -> Bundle:
    """Export both towers of `checkpoint`, run the parity gate, and write the bundle to `output`.

    An existing bundle at `output` is replaced once the new one is complete. Artifacts that fail the
    parity gate do not stop the export: the manifest records their verdicts, and assembling a model
    repository leaves them out.

    Raises:
        InputError: a directory or file of the options cannot be used.
    """
    options = options or Options()
    _check_weight_size(checkpoint, options)
    _check_float16(checkpoint, options)
    with new_directory(output, "manifest.json") as directory:
        checkpoint.tokenizer.save(str(directory / "tokenizer.json"))
        data = data_for(
            checkpoint,
            directory / "tokenizer.json",
            progress,
            pictures=options.pictures,
            captions=options.captions,
            labelled=options.labelled,
        )
        for reason in data.skipped[:5]:
            progress(f"skipped {reason}")
        if data.skipped:
            progress(f"skipped {len(data.skipped)} images that cannot be read")
        expected = references(checkpoint, data, progress)
        work = _Work(checkpoint, directory, options, data, progress, expected)
        artifacts = [artifact for tower in TOWERS for artifact in _artifacts(work, tower)]
        if options.prefix_tree:
            artifacts += _prefix_tree_artifacts(work)
        manifest = _manifest(checkpoint, directory, artifacts)
        write_text(directory / "manifest.json", manifest.to_json())
    return Bundle.open(output)


def _check_weight_size(checkpoint: Checkpoint, options: Options) -> None:
    """Check that the towers are small enough for INT8.

    Quantization serializes a graph into one protobuf message. Checking here reports the limit
    before the export has spent minutes on other artifacts.
    """
    if not {Precision.INT8, Precision.INT8_FP16, Precision.INT8_DYNAMIC} & set(options.precisions):
        return
    for tower in TOWERS:
        if (size := weights_bytes(tower_of(checkpoint, tower))) > PROTOBUF_LIMIT:
            raise InputError(
                f"the {tower} tower of {checkpoint.name} has {size / 1e9:.1f} GB of weights, "
                "but INT8 needs a tower of at most 2 GB",
                advice="leave INT8 out: --precision fp32 --precision fp16",
            )


def _check_float16(checkpoint: Checkpoint, options: Options) -> None:
    """Check that float16 graphs can hold the weights.

    An infinite weight makes embeddings NaN, if need be only those of inputs that the parity gate
    does not try, such as those with one token.
    """
    if not {Precision.FP16, Precision.INT8_FP16} & set(options.precisions):
        return
    others = [p for p in options.precisions if p not in (Precision.FP16, Precision.INT8_FP16)]
    kept = " ".join(f"--precision {name}" for name in dict.fromkeys((Precision.FP32, *others)))
    for tower in TOWERS:
        if (found := float16_overflow(tower_of(checkpoint, tower))) is not None:
            name, value = found
            raise InputError(
                f"it has a value of {value:g}, but float16 ends at 65504",
                name=f"{checkpoint.name}, {tower} tower, weight {name}",
                advice=f"leave out fp16 and int8-fp16: {kept}",
            )


def _artifacts(work: _Work, tower: Tower) -> list[Artifact]:
    """Export the requested artifacts of one tower and run the parity gate on each."""
    checkpoint, precisions = work.checkpoint, work.options.precisions
    module = tower_of(checkpoint, tower)
    metadata = _metadata(checkpoint)
    artifacts = []

    work.progress(f"{tower} tower: fp32")
    graph = work.directory / f"{tower}.fp32.onnx"
    files = export_onnx(for_inference(module), graph, metadata)
    artifacts.append(_with_verdicts(work, _artifact(tower, "fp32", files)))
    half = work.directory / f"{tower}.fp16.onnx"
    if {Precision.FP16, Precision.INT8_FP16} & set(precisions):
        work.progress(f"{tower} tower: fp16")
        files = export_onnx(half_precision(module), half, metadata)
        artifacts.append(_with_verdicts(work, _artifact(tower, "fp16", files)))
    if work.options.torchscript:
        work.progress(f"{tower} tower: TorchScript")
        traced = work.directory / f"{tower}.fp32.torchscript.pt"
        export_torchscript(module, traced)
        artifact = replace(_artifact(tower, "fp32", [traced]), kind="torchscript")
        artifacts.append(_with_verdicts(work, artifact))
    if Precision.INT8_DYNAMIC in precisions:
        work.progress(f"{tower} tower: int8-dynamic")
        dynamic = work.directory / f"{tower}.int8-dynamic.onnx"
        write_dynamic(graph, dynamic)
        artifacts.append(_with_verdicts(work, _artifact(tower, "int8-dynamic", [dynamic])))
    if Precision.INT8 in precisions:
        artifacts.append(_int8(work, tower, graph, "int8"))
    if Precision.INT8_FP16 in precisions:
        artifacts.append(_int8(work, tower, half, "int8-fp16"))
    return artifacts


def _prefix_tree_artifacts(work: _Work) -> list[Artifact]:
    """Export the prefix-tree graphs and run the parity gate on them.

    They embed the same texts as the text tower, so the gate compares them with the same reference.
    """
    work.progress("prefix tree: fp32")
    graph = work.directory / "prefix_tree.fp32.onnx"
    tower = PrefixTreeTower(work.checkpoint.clip.text)
    files = export_onnx(tower, graph, _metadata(work.checkpoint))
    artifacts = [_with_verdicts(work, _artifact("prefix_tree", "fp32", files))]
    if Precision.INT8 in work.options.precisions:
        artifacts.append(_int8(work, "prefix_tree", graph, "int8"))
    return artifacts


def _int8(work: _Work, graph: Graph, source: Path, precision: str) -> Artifact:
    """Quantize `source`.

    While the result fails the parity gate, the layers that lose the most accuracy are left in
    floating point.
    """
    title, batches = f"{graph} graph", work.data.calibration[TOWER_OF[graph]]
    if graph == "prefix_tree":
        batches = in_trees(batches, work.checkpoint.text.end_id)
    work.progress(f"{title}: {precision}")
    target = work.directory / f"{graph}.{precision}.onnx"

    def with_verdicts(quantization: Quantisation) -> Artifact:
        artifact = _artifact(graph, precision, [target])
        return _with_verdicts(work, replace(artifact, quantisation=quantization))

    return write_int8(
        onnx.load(source),
        target,
        batches,
        work.data.source,
        work.options.method,
        with_verdicts,
        lambda s, done=0, total=0: work.progress(f"{title}: {precision}, {s}", done, total),
    )


def _artifact(graph: Graph, precision: str, files: list[Path]) -> Artifact:
    described = tuple(describe_file(file) for file in files)
    return Artifact(graph=graph, kind="onnx", precision=precision, files=described)


def _with_verdicts(work: _Work, artifact: Artifact) -> Artifact:
    bundle = Bundle(work.directory, _manifest(work.checkpoint, work.directory, [artifact]))
    return judged(bundle, artifact, work.references[artifact.tower], work.progress)


def tower_of(checkpoint: Checkpoint, tower: Tower) -> ImageTower | TextTower:
    """Return the `nn.Module` of one tower."""
    return checkpoint.clip.image if tower == "image" else checkpoint.clip.text


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the metadata properties of an exported graph."""
    facts = {"source": checkpoint.source, "weights_sha256": checkpoint.weights_sha256}
    return facts | tools()


def tools() -> dict[str, str]:
    """Return the versions of the packages that produce artifacts, by package name."""
    versions = {}
    for package in ("clip-deploy", "torch", "onnx", "onnxscript", "onnxruntime"):
        with contextlib.suppress(
            importlib.metadata.PackageNotFoundError
        ):  # a checkout that is not installed
            versions[package] = importlib.metadata.version(package)
    return versions


def _manifest(checkpoint: Checkpoint, work: Path, artifacts: list[Artifact]) -> Manifest:
    return Manifest(
        format=MANIFEST_FORMAT,
        name=checkpoint.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        architecture=architecture_of(checkpoint),
        activation=checkpoint.clip.config.text.activation,
        embed_dim=checkpoint.clip.config.embed_dim,
        logit_scale=checkpoint.clip.logit_scale.exp().item(),
        templates=checkpoint.templates,
        image=checkpoint.image,
        text=checkpoint.text,
        tokenizer=describe_file(work / "tokenizer.json"),
        provenance=Provenance(
            source=checkpoint.source,
            weights=checkpoint.weights,
            weights_sha256=checkpoint.weights_sha256,
            tools=tools(),
        ),
        artifacts=tuple(artifacts),
    )


def architecture_of(checkpoint: Checkpoint) -> str:
    """Return a one-line description of both towers."""
    image, text = checkpoint.clip.config.image, checkpoint.clip.config.text
    if isinstance(image, ResNetConfig):
        tower = f"ResNet {'-'.join(map(str, image.layers))} width {image.width}"
    else:
        tower = f"ViT {image.layers}x{image.width} patch {image.patch_size} {image.activation}"
    return f"{tower}, {image.image_size} px; text {text.layers}x{text.width} {text.activation}"


def count_parameters(config: ClipConfig) -> int:
    """Return the number of parameters of both towers, without allocating them."""
    with torch.device("meta"):
        clip = Clip(config, OPENAI_MEAN, OPENAI_STD)
    return sum(parameter.numel() for parameter in clip.parameters())
