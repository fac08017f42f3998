"""Parity gate: compares a runner's embeddings with those of eager float32 on the same batches.

A verdict depends on the smallest cosine, for float32 on the largest absolute difference, and with
labeled images on the zero-shot accuracy relative to eager float32. A failed verdict records the
same numbers as a passed one.
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
    """Reference results of one tower, from eager float32."""

    probes: list[tuple[Batch, Embeddings]]
    labelled: "LabelledReference | None"
    candidates: Embeddings | None = None
    """Probe embeddings of the other tower. Without labeled data, top-1 is chosen among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledReference:
    """Eager float32 embeddings of labeled images and of their labels."""

    data: Labelled
    images: Embeddings
    labels: Embeddings

    @property
    def accuracy(self) -> float:
        """Zero-shot top-1 accuracy, 0..1."""
        return self._accuracy(top1(self.images, self.labels))

    def scores(self, runner: Runner, tower: Tower) -> tuple[float, float]:
        """Return the top-1 agreement with eager float32, and the accuracy, of `runner`.

        `runner` replaces `tower`; the other tower stays eager float32.
        """
        if tower == "image":
            chosen = top1(embed(runner, self.data.images), self.labels)
        else:
            chosen = top1(self.images, embed_labels(runner, self.data))
        agreement = float((chosen == top1(self.images, self.labels)).mean())
        return agreement, self._accuracy(chosen)

    def _accuracy(self, chosen: NDArray[np.intp]) -> float:
        return float((chosen == self.data.truth).mean())


def expect(
    runner: Runner, batches: Iterable[Batch], labelled: LabelledReference | None
) -> Expected:
    """Run the reference `runner`, which must be open, on each batch."""
    return Expected(probes=[(batch, runner.run(batch)) for batch in batches], labelled=labelled)


def refer(images: Runner, texts: Runner, data: Labelled) -> LabelledReference:
    """Embed labeled data with the reference runners of both towers, which must be open."""
    return LabelledReference(
        data=data, images=embed(images, data.images), labels=embed_labels(texts, data)
    )


def embed(runner: Runner, batches: Sequence[Batch]) -> Embeddings:
    """Return the embeddings of all `batches`, float32 [n, dim]."""
    return np.concatenate([runner.run(batch) for batch in batches])


def embed_labels(runner: Runner, data: Labelled) -> Embeddings:
    """Return the class embeddings of all labels, float32 [labels, dim], unit length.

    A class embedding is the mean over the label's prompt templates.
    """
    embeddings = embed(runner, data.texts)
    classes = ClassEmbeddings(len(embeddings) // data.templates, data.templates)
    classes.add(range(len(embeddings)), embeddings)
    return classes.unit()


def top1(images: Embeddings, labels: Embeddings) -> NDArray[np.intp]:
    """Return the index of the nearest label for each image."""
    nearest: NDArray[np.intp] = (images @ labels.T).argmax(axis=1)
    return nearest


def judge(runner: Runner, expected: Expected, tower: Tower) -> Verdict:
    """Run `runner`, which must be open, on the batches of `expected` and compare the embeddings.

    A batch gets a cosine of -1, which fails the gate, if the runner raises an error on it or
    returns another shape or a number that is not finite. The verdict has the reason of the first.
    """
    cosine_parts, differences, same = [], [], []
    reason = None
    for batch, want in expected.probes:
        got, fault = _run(runner, batch, want.shape)
        if got is None:
            reason = reason or fault
            cosine_parts.append(np.full(len(want), -1.0))
            differences.append(2.0)
            continue
        norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
        products = (got.astype(np.float64) * want).sum(axis=1)
        cosine_parts.append(np.where(norms > 0, products / np.maximum(norms, 1e-12), -1.0))
        differences.append(float(np.abs(got - want).max()))
        if expected.candidates is not None:
            same.append(top1(got, expected.candidates) == top1(want, expected.candidates))
    cosines = np.concatenate(cosine_parts)
    agreement = float(np.concatenate(same).mean()) if same else None
    accuracy = relative = None
    tolerance = TOLERANCES[runner.spec.precision]
    accuracy_lost = False
    if expected.labelled is not None and cosines.min() > -1:
        try:
            agreement, accuracy = expected.labelled.scores(runner, tower)
        except RunnerError as error:
            reason = f"labeled data: {error.reason}"
        else:
            fp32 = expected.labelled.accuracy
            relative = accuracy / fp32 if fp32 else 1.0  # at 0 there is no accuracy to lose
            # In a small data set, one image can exceed the relative tolerance; one is never enough.
            lost = (fp32 - accuracy) * len(expected.labelled.data.truth)
            accuracy_lost = relative < tolerance.relative_accuracy and lost > 1.5
    passed = (
        reason is None
        and cosines.min() >= tolerance.min_cosine
        and max(differences) <= tolerance.max_abs_difference
        and not accuracy_lost
    )
    return Verdict(
        runner=runner.name,
        passed=bool(passed),
        embeddings=len(cosines),
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        max_abs_difference=max(differences),
        top1_agreement=agreement,
        accuracy=accuracy,
        relative_accuracy=relative,
        runtime_version=runner.runtime_version,
        machine=describe(),
        reason=reason,
    )


def _run(
    runner: Runner, batch: Batch, shape: tuple[int, ...]
) -> tuple[Embeddings | None, str | None]:
    """Return finite embeddings of `shape`, or None and the reason why there are none."""
    try:
        got = runner.run(batch)
    except RunnerError as error:
        return None, error.reason
    if got.shape != shape:
        return None, f"expected embeddings of shape {list(shape)}, got {list(got.shape)}"
    if not np.isfinite(got).all():
        return None, f"{(~np.isfinite(got)).sum()} of {got.size} numbers are not finite"
    return got, None


def judged_plan(
    bundle: Bundle, artifact: Artifact, expected: Expected, progress: Progress
) -> Artifact:
    """Return an engine's artifact with its verdict, or without one if it cannot run here."""
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
    """Return `bundle` with `artifact` as its only engine, so that a runner selects this one."""
    graphs = tuple(a for a in bundle.manifest.artifacts if a.kind != "engine")
    manifest: Manifest = replace(bundle.manifest, artifacts=(*graphs, artifact))
    return Bundle(bundle.path, manifest)
