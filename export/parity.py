"""THE gate: a runner's embeddings against eager float32's, on the same batches."""

from collections.abc import Iterable, Sequence

import numpy as np

from serving.bundle import TOLERANCES, Verdict
from serving.machine import describe
from serving.runners.base import Batch, Embeddings, Runner


def reference(runner: Runner, batches: Iterable[Batch]) -> list[tuple[Batch, Embeddings]]:
    """What `runner` (entered; the reference) makes of each batch."""
    return [(batch, runner.run(batch)) for batch in batches]


def judge(runner: Runner, expected: Sequence[tuple[Batch, Embeddings]], precision: str) -> Verdict:
    """Run `runner` (entered) over the batches of `expected` and compare.

    A batch that comes back in another shape, or with a number that is not finite, fails with a
    cosine of -1: there is no such thing as nearly right there.
    """
    cosines, differences = [], []
    for batch, want in expected:
        got = runner.run(batch)
        if got.shape != want.shape or not np.isfinite(got).all():
            cosines.append(np.full(len(want), -1.0))
            differences.append(2.0)
            continue
        norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
        cosines.append((got.astype(np.float64) * want).sum(axis=1) / norms)
        differences.append(float(np.abs(got - want).max()))
    every = np.concatenate(cosines)
    tolerance = TOLERANCES[precision]
    passed = every.min() >= tolerance.min_cosine
    return Verdict(
        runner=runner.name,
        passed=bool(passed and max(differences) <= tolerance.max_abs_difference),
        embeddings=len(every),
        min_cosine=float(every.min()),
        mean_cosine=float(every.mean()),
        max_abs_difference=max(differences),
        runtime_version=runner.runtime_version,
        machine=describe(),
    )
