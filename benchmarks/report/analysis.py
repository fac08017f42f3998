"""Analysis of latency results: shares of the device's limits, drift, bootstrap intervals."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.runners.spec import RunnerSpec, device_of
from serving.util.results import InTurns, LatencyRun, Tower, TowerLatency

Work = tuple[Tower, int, int | None]
"""Tower, batch size and, for texts, the length in tokens."""

_RESAMPLES = 2000
_UNQUIET = 1.5
"""Largest drift of the reference on an idle machine. More means that something else used the
machine, or that a runner keeps using it after its runs (spinning threads caused 1.3 to 2.5)."""


def work_of(one: TowerLatency) -> Work:
    """Return the work of an entry."""
    return one.tower, one.batch, one.length


def works(run: LatencyRun) -> list[Work]:
    """Return every work of a run in ascending order, images first."""
    return sorted(
        {work_of(t) for t in run.towers}, key=lambda work: (work[0], work[2] or 0, work[1])
    )


def of(run: LatencyRun, work: Work) -> list[TowerLatency]:
    """Return the entries of all runners on one work, fastest first.

    They are sorted by ratio, which drift of the machine does not affect.
    """
    return sorted((t for t in run.towers if work_of(t) == work), key=lambda one: -one.ratio)


def limit(run: LatencyRun, one: TowerLatency) -> float | None:
    """Return the device's rate of matrix products in an entry's precision, in 1e12 operations/s.

    Return None if it was not measured, or if the entry did not run on the device of the run.
    """
    spec = RunnerSpec.parse(one.runner)
    if device_of(spec) != run.device:
        return None
    name = multiplied_in(spec)
    # CPUs do not multiply half floats: runtimes convert such graphs to float32.
    return run.limits.matmul_tflops.get("fp32" if run.device == "cpu" and name == "fp16" else name)


def multiplied_in(spec: RunnerSpec) -> str:
    """Return the precision of a runner's matrix products, such as `int8` for `int8-fp16`."""
    return "int8" if spec.precision.startswith("int8") else spec.precision


def tflops(one: TowerLatency) -> float:
    """Return the rate of an entry in 1e12 operations/s, without transfers if that was measured."""
    return one.gflop / (one.device_timing or one.timing).milliseconds


def fraction(run: LatencyRun, one: TowerLatency) -> float | None:
    """Return the rate of operations as a share of the device's limit, or None without a limit."""
    best = limit(run, one)
    return tflops(one) / best if best else None


def bytes_fraction(run: LatencyRun, one: TowerLatency) -> float | None:
    """Return the rate of reading weights as a share of the copy rate; it limits small batches."""
    if device_of(RunnerSpec.parse(one.runner)) != run.device:
        return None
    seconds = (one.device_timing or one.timing).milliseconds / 1e3
    return one.weight_bytes / 1e9 / seconds / run.limits.copy_gb_per_s


def drift(run: LatencyRun) -> float:
    """Return the drift of the reference: the largest ratio of two of its medians on one work."""
    medians: dict[Work, list[float]] = {}
    for one in run.towers:
        medians.setdefault(work_of(one), []).append(one.reference_ms)
    return max((max(times) / min(times) for times in medians.values()), default=1.0)


def disturbed(run: LatencyRun) -> str | None:
    """Return a warning if the reference drifted so far that ratios are unreliable."""
    if (moved := drift(run)) <= _UNQUIET:
        return None
    return (
        f"the machine was not idle: the latency of the same work by {run.reference} varied by "
        f"{moved:.2f}x over the run; measure again before relying on a ratio"
    )


def itself(run: LatencyRun) -> tuple[float, float]:
    """Return the lowest and the highest ratio of the reference to itself."""
    ratios = [one.ratio for one in run.towers if one.runner == run.reference]
    return min(ratios, default=1.0), max(ratios, default=1.0)


def resampled(one: InTurns, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the median ratio of bootstrap samples of the turns: float64 [resamples]."""
    every = np.asarray(one.ratios)
    drawn = rng.integers(0, len(every), (_RESAMPLES, len(every)))
    ratios: NDArray[np.float64] = np.median(every[drawn], axis=1)
    return ratios


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the interval that contains 95 % of `values`."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def each(throughputs: Sequence[float]) -> str:
    """Format the throughputs of repeated measurements."""
    return ", ".join(f"{value:.1f}" for value in throughputs)
