"""THE gate: a runner's embeddings against eager float32's, on the same batches.

Judged are the worst cosine, for float32 the largest difference, and with labelled pictures the
zero-shot accuracy as a share of eager float32's. What fails is recorded with its numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.gate.datasets import Labelled
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOLERANCES, Artifact, Manifest, Tower, Verdict
from serving.errors import RunnerError
from serving.runners.base import Batch, Embeddings, Runner
from serving.runners.registry import missing, open_runner
from serving.runners.spec import runners_of
from serving.tasks.zero_shot import ClassEmbeddings
from serving.util.machine import describe
from serving.util.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What eager float32 makes of the probes of one tower, and of the labelled data."""

    probes: list[tuple[Batch, Embeddings]]
    labelled: "LabelledReference | None"
    candidates: Embeddings | None = None
    """The other tower's probe embeddings: what top-1 is chosen from without labelled data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledReference:
    """Eager float32's embeddings of labelled pictures and of their labels."""

    data: Labelled
    images: Embeddings
    labels: Embeddings

    @property
    def accuracy(self) -> float:
        """Zero-shot top-1."""
        return self._accuracy(top1(self.images, self.labels))

    def scores(self, runner: Runner, tower: Tower) -> tuple[float, float]:
        """Agreement with eager's top-1, and accuracy, with `runner` in place of one tower."""
        if tower == "image":
            mine = top1(embed(runner, self.data.images), self.labels)
        else:
            mine = top1(self.images, embed_labels(runner, self.data))
        agreement = float((mine == top1(self.images, self.labels)).mean())
        return agreement, self._accuracy(mine)

    def _accuracy(self, chosen: NDArray[np.intp]) -> float:
        return float((chosen == self.data.truth).mean())


def expect(
    runner: Runner, batches: Iterable[Batch], labelled: LabelledReference | None
) -> Expected:
    """What `runner` (entered; the reference) makes of each batch."""
    return Expected(probes=[(batch, runner.run(batch)) for batch in batches], labelled=labelled)


def refer(images: Runner, texts: Runner, data: Labelled) -> LabelledReference:
    """Embed labelled data with both reference towers (entered)."""
    return LabelledReference(
        data=data, images=embed(images, data.images), labels=embed_labels(texts, data)
    )


def embed(runner: Runner, batches: Sequence[Batch]) -> Embeddings:
    """All embeddings of `batches`, float32 [n, dim]."""
    return np.concatenate([runner.run(batch) for batch in batches])


def embed_labels(runner: Runner, data: Labelled) -> Embeddings:
    """One embedding a label: the mean over its templates, float32 [labels, dim], unit length."""
    every = embed(runner, data.texts)
    classes = ClassEmbeddings(len(every) // data.templates, data.templates)
    classes.add(range(len(every)), every)
    return classes.unit()


def top1(images: Embeddings, labels: Embeddings) -> NDArray[np.intp]:
    """For each picture the number of the nearest label."""
    nearest: NDArray[np.intp] = (images @ labels.T).argmax(axis=1)
    return nearest


def judge(runner: Runner, expected: Expected, tower: Tower) -> Verdict:
    """Run `runner` (entered) over the batches of `expected` and compare.

    A batch that cannot be run, comes back in another shape, or with a number that is not finite,
    fails with a cosine of -1: there is no such thing as nearly right there.
    """
    cosines, differences, same = [], [], []
    for batch, want in expected.probes:
        got = _run(runner, batch)
        if got is None or got.shape != want.shape or not np.isfinite(got).all():
            cosines.append(np.full(len(want), -1.0))
            differences.append(2.0)
            continue
        norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
        products = (got.astype(np.float64) * want).sum(axis=1)
        cosines.append(np.where(norms > 0, products / np.maximum(norms, 1e-12), -1.0))
        differences.append(float(np.abs(got - want).max()))
        if expected.candidates is not None:
            same.append(top1(got, expected.candidates) == top1(want, expected.candidates))
    every = np.concatenate(cosines)
    agreement = float(np.concatenate(same).mean()) if same else None
    accuracy = relative = None
    tolerance = TOLERANCES[runner.spec.precision]
    lost_too_many = False
    if expected.labelled is not None and every.min() > -1:
        agreement, accuracy = expected.labelled.scores(runner, tower)
        # Where float32 is never right there is nothing to lose.
        fp32 = expected.labelled.accuracy
        relative = accuracy / fp32 if fp32 else 1.0
        # One picture more or less is noise, however few there are.
        pictures = len(expected.labelled.data.truth)
        lost_too_many = (
            relative < tolerance.relative_accuracy and (fp32 - accuracy) * pictures > 1.5
        )
    passed = (
        every.min() >= tolerance.min_cosine
        and max(differences) <= tolerance.max_abs_difference
        and not lost_too_many
    )
    return Verdict(
        runner=runner.name,
        passed=bool(passed),
        embeddings=len(every),
        min_cosine=float(every.min()),
        mean_cosine=float(every.mean()),
        max_abs_difference=max(differences),
        top1_agreement=agreement,
        accuracy=accuracy,
        relative_accuracy=relative,
        runtime_version=runner.runtime_version,
        machine=describe(),
    )


def _run(runner: Runner, batch: Batch) -> Embeddings | None:
    try:
        return runner.run(batch)
    except RunnerError:
        return None


def judged_plan(
    bundle: Bundle, artifact: Artifact, expected: Expected, progress: Progress
) -> Artifact:
    """`artifact`, a plan, with its verdict on this machine; without one where it cannot run."""
    (spec,) = runners_of(artifact)
    if (reason := missing(spec)) is not None:
        progress(f"no verdict on {artifact.file}: {reason}")
        return replace(artifact, verdicts=())
    try:
        with open_runner(alone(bundle, artifact), artifact.graph, spec) as runner:
            return replace(artifact, verdicts=(judge(runner, expected, artifact.tower),))
    except RunnerError as error:
        progress(f"no verdict on {artifact.file}: {error}")
        return replace(artifact, verdicts=())


def alone(bundle: Bundle, artifact: Artifact) -> Bundle:
    """`bundle` with `artifact` as its only plan, so that no other can be taken for it."""
    graphs = tuple(a for a in bundle.manifest.artifacts if a.kind != "engine")
    manifest: Manifest = replace(bundle.manifest, artifacts=(*graphs, artifact))
    return Bundle(bundle.path, manifest)
