"""The gate over a whole bundle: every artifact by every runner that there is, here and now.

`build.py` asks this of what it has made, `clip-deploy verify` of what was made before.

Does not know: how embeddings are compared (`parity.py`), what is a fault of a graph (`lint.py`).
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
from serving.errors import BundleError, RunnerError
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
    """What to calibrate and to judge by; see `export.gate.datasets.load_data`.

    Raises:
        InputError: a folder or file cannot be used.
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
    """What eager float32 makes of the probes and of the labelled data."""
    progress("reference embeddings by eager fp32")
    with EagerRunner(checkpoint.clip.image) as images, EagerRunner(checkpoint.clip.text) as texts:
        labelled: LabelledReference | None = None
        if data.labelled is not None:
            labelled = refer(images, texts, data.labelled)
        image = expect(images, probes("image", checkpoint.image, checkpoint.text), labelled)
        text = expect(texts, probes("text", checkpoint.image, checkpoint.text), labelled)
    return {
        "image": replace(image, candidates=np.concatenate([e for _, e in text.probes])),
        "text": replace(text, candidates=np.concatenate([e for _, e in image.probes])),
    }


def judged(
    bundle: Bundle, artifact: Artifact, expected: Expected, progress: Progress = silent
) -> Artifact:
    """`artifact` with the verdict of every runner that this environment and machine have.

    Raises:
        BundleError: a file is not the exported one, or lint found fault with the graph.
    """
    is_graph = artifact.kind == "onnx"
    if is_graph and (problems := lint(bundle.verified(artifact), artifact.graph)):
        raise BundleError("; ".join(problems))
    if artifact.kind == "engine":
        bundle.verified(artifact)  # also where it cannot run
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
            except RunnerError as error:  # such as bfloat16 on a CPU without it: never served
                progress(f"no verdict: {error}")
                continue
            verdicts.append(judge(runner, expected, artifact.tower))
    return replace(artifact, verdicts=tuple(verdicts))


def verify(bundle: Bundle, source: str | None, labelled: Path | None, progress: Progress) -> Bundle:
    """`bundle` with verdicts measured here and now; nothing on disk changes.

    Raises:
        BundleError: a file is not the exported one, or `source` has other weights.
    """
    checkpoint = checkpoint_of(bundle, source)
    data = data_for(checkpoint, bundle.tokenizer, progress, labelled=labelled)
    expected = references(checkpoint, data, progress)
    artifacts = []
    for artifact in bundle.manifest.artifacts:
        progress(f"parity of {artifact.file}")
        artifacts.append(judged(bundle, artifact, expected[artifact.tower], progress))
    return Bundle(bundle.path, replace(bundle.manifest, artifacts=tuple(artifacts)))


def checkpoint_of(bundle: Bundle, source: str | None = None) -> Checkpoint:
    """The checkpoint that `bundle` was made of, from `source` or from where it was then.

    Raises:
        CheckpointError: it is not there any more.
        BundleError: `source` has other weights.
    """
    provenance = bundle.manifest.provenance
    checkpoint = load_checkpoint(
        source or provenance.source,
        vocabulary=bundle.tokenizer,
        activation=bundle.manifest.activation,
    )
    if checkpoint.weights_sha256 != provenance.weights_sha256:
        raise BundleError(
            f"{checkpoint.source} has weights {checkpoint.weights_sha256[:16]}..., the bundle was "
            f"made of {provenance.weights_sha256[:16]}...; give its --checkpoint"
        )
    return checkpoint
