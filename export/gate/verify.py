"""Parity gate for a whole bundle: checks each artifact with each runner available on this machine.

`export.pipeline` runs it on each new artifact, `clip-deploy verify` on an existing bundle.
`export.gate.parity` compares embeddings, `export.graphs.lint` checks graphs.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from export.checkpoints.load import Checkpoint, load_checkpoint
from export.gate.datasets import Data, load_data, probes
from export.gate.parity import Expected, LabelledReference, expect, judge, judged_plan, refer
from export.gate.torch_runners import EagerRunner, TorchScriptRunner
from export.graphs.lint import lint
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Artifact, Tower
from serving.errors import BundleError, CheckpointError, RunnerError
from serving.inputs.tokenizer import Tokenizer
from serving.runners.base import Runner
from serving.runners.prefix_tree import open_prefix_tree
from serving.runners.registry import missing, open_runner
from serving.runners.spec import runners_of
from serving.util.progress import Progress, silent


def data_for(
    checkpoint: Checkpoint,
    tokenizer: Path,
    progress: Progress,
    *,
    pictures: Path | None = None,
    captions: Path | None = None,
    labelled: Path | None = None,
) -> Data:
    """Load calibration data and labeled data for a checkpoint.

    See `export.gate.datasets.load_data` for the arguments.

    Raises:
        InputError: a directory or file cannot be used.
    """
    return load_data(
        checkpoint.image,
        Tokenizer(tokenizer, checkpoint.text),
        checkpoint.templates,
        checkpoint.text,
        pictures=pictures,
        captions=captions,
        labelled=labelled,
        progress=progress,
    )


def references(checkpoint: Checkpoint, data: Data, progress: Progress) -> dict[Tower, Expected]:
    """Return the reference results of both towers: eager float32 on probes and labeled data.

    Raises:
        CheckpointError: eager float32 computes embeddings that are not finite.
    """
    progress("reference embeddings by eager fp32")
    with EagerRunner(checkpoint.clip.image) as images, EagerRunner(checkpoint.clip.text) as texts:
        labelled: LabelledReference | None = None
        try:
            if data.labelled is not None:
                labelled = refer(images, texts, data.labelled)
            image = expect(images, probes("image", checkpoint.image, checkpoint.text), labelled)
            text = expect(texts, probes("text", checkpoint.image, checkpoint.text), labelled)
        except RunnerError as error:
            raise CheckpointError(
                f"its towers do not compute embeddings in float32: {error}",
                name=checkpoint.name,
                advice="the weights are finite but overflow: use another checkpoint",
            ) from error
    return {
        "image": replace(image, candidates=np.concatenate([e for _, e in text.probes])),
        "text": replace(text, candidates=np.concatenate([e for _, e in image.probes])),
    }


def judged(
    bundle: Bundle, artifact: Artifact, expected: Expected, progress: Progress = silent
) -> Artifact:
    """Return `artifact` with a verdict for every runner that works on this machine.

    Raises:
        BundleError: a file differs from the exported one, or lint found a problem in the graph.
    """
    is_graph = artifact.kind == "onnx"
    if is_graph and (problems := lint(bundle.verified(artifact), artifact.graph)):
        raise BundleError("; ".join(problems))
    if artifact.kind == "engine":
        bundle.verified(artifact)  # judged_plan does not check files if the engine cannot run here
        return judged_plan(bundle, artifact, expected, progress)
    if artifact.kind == "torchscript":
        candidates: list[Runner] = [TorchScriptRunner(bundle.verified(artifact))]
    else:
        here = [spec for spec in runners_of(artifact) if missing(spec) is None]
        candidates = [
            open_prefix_tree(bundle, spec)
            if artifact.graph == "prefix_tree"
            else open_runner(bundle, artifact.graph, spec)
            for spec in here
        ]
    verdicts = []
    for candidate in candidates:
        with ExitStack() as stack:
            try:
                runner = stack.enter_context(candidate)
            except RunnerError as error:  # for example bfloat16 on a CPU without it
                progress(f"no verdict: {error}")
                continue
            verdicts.append(judge(runner, expected, artifact.tower))
    return replace(artifact, verdicts=tuple(verdicts))


def verify(bundle: Bundle, source: str | None, labelled: Path | None, progress: Progress) -> Bundle:
    """Return a copy of `bundle` with verdicts measured on this machine. No file is changed.

    Args:
        bundle: the bundle to verify.
        source: name or path of the checkpoint that it was exported from; by default, the source in
            its manifest.
        labelled: directory of labeled images for zero-shot accuracy.
        progress: called with each step.

    Raises:
        BundleError: a file differs from the exported one, lint found a problem in a graph, or the
            checkpoint has other weights than the bundle.
        CheckpointError: the checkpoint does not exist or cannot be loaded.
        InputError: `labelled` cannot be used.
    """
    checkpoint = checkpoint_of(bundle, source)
    data = data_for(checkpoint, bundle.tokenizer, progress, labelled=labelled)
    expected = references(checkpoint, data, progress)
    artifacts = []
    for artifact in bundle.manifest.artifacts:
        progress(f"parity gate: {artifact.file}")
        artifacts.append(judged(bundle, artifact, expected[artifact.tower], progress))
    return Bundle(bundle.path, replace(bundle.manifest, artifacts=tuple(artifacts)))


def checkpoint_of(bundle: Bundle, source: str | None = None) -> Checkpoint:
    """Load the checkpoint that `bundle` was exported from.

    Args:
        bundle: a bundle.
        source: name or path of the checkpoint; by default, the source in the manifest.

    Raises:
        CheckpointError: the checkpoint does not exist or cannot be loaded.
        BundleError: the checkpoint has other weights than the bundle.
    """
    provenance = bundle.manifest.provenance
    checkpoint = load_checkpoint(
        source or provenance.source,
        vocabulary=bundle.tokenizer,
        activation=bundle.manifest.activation,
    )
    if checkpoint.weights_sha256 != provenance.weights_sha256:
        raise BundleError(
            f"{checkpoint.source} has weights {checkpoint.weights_sha256[:16]}..., but the bundle "
            f"was exported from {provenance.weights_sha256[:16]}...",
            advice="give the checkpoint of the bundle with --checkpoint",
        )
    return checkpoint
