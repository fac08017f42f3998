"""Checkpoint -> bundle: every step in order, written beside its place and then renamed."""

import datetime
import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from export.architectures import OPENAI_MEAN, OPENAI_STD
from export.calibration import probes
from export.checkpoint import Checkpoint, load_checkpoint
from export.parity import judge, reference
from export.to_onnx import OPSET, export_onnx
from export.torch_runners import EagerRunner
from export.towers import Clip, ClipConfig, ImageTower, ResNetConfig, TextTower
from serving.bundle import (
    FORMAT,
    TOWERS,
    Artifact,
    Bundle,
    Manifest,
    Provenance,
    Tower,
    describe_file,
)
from serving.errors import BundleError
from serving.files import new_directory, write_text
from serving.runners.base import open_runner

Progress = Callable[[str], None]
"""Told what is being done next."""

STEPS = 2 * len(TOWERS)


def build(checkpoint: Checkpoint, output: Path, progress: Progress) -> Bundle:
    """Export both towers of `checkpoint`, judge them, and write the bundle to `output`.

    A bundle that was at `output` stays whole until the new one is finished, and then gives way.
    The gate's refusals do not stop the build: they stand in the manifest, and assembly obeys them.
    """
    with new_directory(output) as work:
        checkpoint.tokenizer.save(str(work / "tokenizer.json"))
        artifacts = []
        for tower in TOWERS:
            progress(f"{tower} tower: ONNX fp32")
            artifacts.append(_export(checkpoint, tower, work))
        bundle = Bundle(work, _manifest(checkpoint, work, artifacts))
        for tower in TOWERS:
            progress(f"{tower} tower: parity with eager fp32")
            bundle = gate(checkpoint, bundle, tower)
        write_text(work / "manifest.json", bundle.manifest.to_json())
    return Bundle.open(output)


def gate(checkpoint: Checkpoint, bundle: Bundle, tower: Tower) -> Bundle:
    """`bundle` with fresh verdicts for `tower`'s artifacts, measured here and now."""
    batches = probes(tower, checkpoint.image, checkpoint.text)
    with EagerRunner(module(checkpoint, tower)) as eager:
        expected = reference(eager, batches)
    artifacts = list(bundle.manifest.artifacts)
    for index, artifact in enumerate(artifacts):
        if artifact.tower == tower:
            name = f"onnxruntime:{artifact.precision}"
            with open_runner(bundle, tower, name) as runner:
                verdict = judge(runner, expected, artifact.precision)
            artifacts[index] = replace(artifact, verdicts=(verdict,))
    return Bundle(bundle.path, replace(bundle.manifest, artifacts=tuple(artifacts)))


def module(checkpoint: Checkpoint, tower: Tower) -> ImageTower | TextTower:
    """The `nn.Module` of one tower."""
    return checkpoint.clip.image if tower == "image" else checkpoint.clip.text


def _export(checkpoint: Checkpoint, tower: Tower, work: Path) -> Artifact:
    metadata = {"source": checkpoint.source, "weights_sha256": checkpoint.weights_sha256}
    path = work / f"{tower}.fp32.onnx"
    files = export_onnx(module(checkpoint, tower), path, metadata | _tools())
    return Artifact(
        tower=tower,
        kind="onnx",
        precision="fp32",
        files=tuple(describe_file(file) for file in files),
        opset=OPSET,
    )


def _tools() -> dict[str, str]:
    packages = ("clip-deploy", "torch", "onnx", "onnxscript", "onnxruntime")
    return {package: importlib.metadata.version(package) for package in packages}


def _manifest(checkpoint: Checkpoint, work: Path, artifacts: list[Artifact]) -> Manifest:
    return Manifest(
        format=FORMAT,
        name=checkpoint.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        architecture=_architecture(checkpoint),
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
            tools=_tools(),
        ),
        artifacts=tuple(artifacts),
    )


def _architecture(checkpoint: Checkpoint) -> str:
    image, text = checkpoint.clip.config.image, checkpoint.clip.config.text
    if isinstance(image, ResNetConfig):
        picture = f"ResNet {'-'.join(map(str, image.layers))} width {image.width}"
    else:
        picture = f"ViT {image.layers}x{image.width} patch {image.patch_size} {image.activation}"
    return f"{picture}, {image.image_size} px; text {text.layers}x{text.width} {text.activation}"


def verify(bundle: Bundle, source: str | None = None) -> Bundle:
    """`bundle` with verdicts measured here and now; nothing on disk changes.

    Raises:
        BundleError: a file is not the exported one, or `source` has other weights.
    """
    manifest = bundle.manifest
    checkpoint = load_checkpoint(
        source or manifest.provenance.source,
        vocabulary=bundle.tokenizer if source is None else None,
    )
    if checkpoint.weights_sha256 != manifest.provenance.weights_sha256:
        raise BundleError(
            f"{checkpoint.source} has weights {checkpoint.weights_sha256[:16]}..., the bundle was "
            f"made of {manifest.provenance.weights_sha256[:16]}...; give its --checkpoint"
        )
    for tower in TOWERS:
        bundle = gate(checkpoint, bundle, tower)
    return bundle


def count_parameters(config: ClipConfig) -> int:
    """Parameters of both towers, without allocating them."""
    with torch.device("meta"):
        clip = Clip(config, OPENAI_MEAN, OPENAI_STD)
    return sum(parameter.numel() for parameter in clip.parameters())
