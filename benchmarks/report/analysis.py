"""What latency results say: shares of the machine's limits, drift, noise, bootstrap intervals."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.runners.spec import RunnerSpec, device_of
from serving.util.results import InTurns, LatencyRun, Tower, TowerLatency

Work = tuple[Tower, int, int | None]
"""Tower, batch, and for texts the length in tokens."""

_RESAMPLES = 2000
_UNQUIET = 1.5
"""A reference that moves by more than this means that something else used the machine, or that a
runner does not rest when it has run. (1.3 to 2.5 were seen with spinning threads.)"""


def work_of(one: TowerLatency) -> Work:
    """Return what an entry computed."""
    return one.tower, one.batch, one.length


def works(run: LatencyRun) -> list[Work]:
    """Return every work of a run: images first, ascending."""
    return sorted(
        {work_of(t) for t in run.towers}, key=lambda work: (work[0], work[2] or 0, work[1])
    )


def of(run: LatencyRun, work: Work) -> list[TowerLatency]:
    """Return the entries of all runners on one work, fastest first.

    Sorted by ratio: the drift between entries does not decide.
    """
    return sorted((t for t in run.towers if work_of(t) == work), key=lambda one: -one.ratio)


def limit(run: LatencyRun, one: TowerLatency) -> float | None:
    """Return 1e12 operations a second that the device multiplies in the precision of an entry.

    None: it was not measured, or the entry ran elsewhere than on the run's device.
    """
    spec = RunnerSpec.parse(one.runner)
    if device_of(spec) != run.device:
        return None
    name = multiplied_in(spec)
    # CPUs have no products of half floats: runtimes turn such graphs into float32.
    return run.limits.matmul_tflops.get("fp32" if run.device == "cpu" and name == "fp16" else name)


def multiplied_in(spec: RunnerSpec) -> str:
    """Return the precision of a runner's matrix products: `int8` of `int8-fp16`."""
    return "int8" if spec.precision.startswith("int8") else spec.precision


def tflops(one: TowerLatency) -> float:
    """Return 1e12 operations a second: on the device alone where that was measured."""
    return one.gflop / (one.device_timing or one.timing).milliseconds


def fraction(run: LatencyRun, one: TowerLatency) -> float | None:
    """Return the rate of operations as a share of the device's limit."""
    best = limit(run, one)
    return tflops(one) / best if best else None


def bytes_fraction(run: LatencyRun, one: TowerLatency) -> float | None:
    """Return the rate at which weights are read as a share of a copy's; it limits small batches."""
    if device_of(RunnerSpec.parse(one.runner)) != run.device:
        return None
    seconds = (one.device_timing or one.timing).milliseconds / 1e3
    return one.weight_bytes / 1e9 / seconds / run.limits.copy_gb_per_s


def drift(run: LatencyRun) -> float:
    """Return how far the reference moved: the largest ratio of two medians of the same work."""
    medians: dict[Work, list[float]] = {}
    for one in run.towers:
        medians.setdefault(work_of(one), []).append(one.reference_ms)
    return max((max(times) / min(times) for times in medians.values()), default=1.0)


def disturbed(run: LatencyRun) -> str | None:
    """Return a warning if the reference moved so far that ratios cannot be relied on."""
    if (moved := drift(run)) <= _UNQUIET:
        return None
    return (
        f"the machine was not quiet: the time of the same work by {run.reference} moved by "
        f"{moved:.2f}x over the run; measure again before relying on a ratio"
    )


def itself(run: LatencyRun) -> tuple[float, float]:
    """Return the lowest and the highest ratio of the reference to itself."""
    ratios = [one.ratio for one in run.towers if one.runner == run.reference]
    return min(ratios, default=1.0), max(ratios, default=1.0)


def resampled(one: InTurns, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the ratio of turns that were drawn again (bootstrap): float64 [resamples]."""
    every = np.asarray(one.ratios)
    drawn = rng.integers(0, len(every), (_RESAMPLES, len(every)))
    ratios: NDArray[np.float64] = np.median(every[drawn], axis=1)
    return ratios


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the interval that holds 95 % of `values`."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def each(throughputs: Sequence[float]) -> str:
    """Format the throughputs of repeated measurements."""
    return " and ".join(f"{value:.1f}" for value in throughputs)
