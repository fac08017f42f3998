"""Comparison of two results that finds changes beyond their noise, also between CI machines.

It compares ratios to the reference, which ran in turns with the runner, so that the overall speed
of the machine cancels out. The turns of both results are resampled (bootstrap). An entry counts as
slower if its change exceeds the threshold and 97.5 % of the samples are slower.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.report.analysis import disturbed, interval, resampled
from serving.errors import InputError
from serving.util.results import LatencyRun, Results, StageLatency, TowerLatency

Verdict = Literal["slower", "faster", "same"]
Entry = TowerLatency | StageLatency


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Change of an entry between two results."""

    name: str
    old: float
    """Older ratio to the reference."""
    new: float
    """Newer ratio to the reference."""
    change: float
    """new / old; 0.8 means 20 % less throughput."""
    low: float
    high: float
    """95 % interval of `change`."""
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Changes of the common entries of two results, and the names of the others."""

    threshold: float
    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    warnings: list[str]

    @property
    def slower(self) -> list[Change]:
        """Changes that should fail a CI job."""
        return [change for change in self.changes if change.verdict == "slower"]


def compare(old: Path, new: Path, threshold: float = 0.15) -> Comparison:
    """Compare two results files.

    Args:
        old: older results file, or its directory.
        new: newer results file, or its directory.
        threshold: relative decrease of a ratio that is tolerated.

    Raises:
        InputError: a file does not have this schema, the results have no entry in common, or the
            threshold is not from 0 to 1.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"expected a number from 0 to 1, got {threshold:g}", name="threshold")
    before, after = Results.read(old), Results.read(new)
    first, second = dict(_entries(before)), dict(_entries(after))
    both = [name for name in first if name in second]
    if not both:
        raise InputError(
            f"{old} and {new} have no entry in common",
            advice="measure both with the same model, device and options",
        )
    return Comparison(
        threshold=threshold,
        changes=[_change(name, first[name], second[name], threshold) for name in both],
        only_old=[name for name in first if name not in second],
        only_new=[name for name in second if name not in first],
        warnings=list(_warnings(old, before, new, after)),
    )


def _entries(results: Results) -> Iterator[tuple[str, Entry]]:
    for run in results.latency:
        where = ", ".join((run.model.name, *([run.device] if run.device != "cpu" else [])))
        for tower in run.towers:
            yield f"{where}: {tower.name}", tower
        for stage in run.stages:
            yield f"{where}: {stage.name}", stage


def _warnings(old: Path, before: Results, new: Path, after: Results) -> Iterator[str]:
    runs: dict[object, LatencyRun] = {run.key: run for run in after.latency}
    for run in before.latency:
        other = runs.get(run.key)
        if other is None:
            continue
        if (was := run.environment.machine) != (now := other.environment.machine):
            yield f"different machines ({was}; {now}): ratios may differ"
        if run.model.weights_sha256 != other.model.weights_sha256:
            yield f"different weights of {run.model.name}"
        for path, one in ((old, run), (new, other)):
            if warning := disturbed(one):
                yield f"{path}: {warning}"


def _change(name: str, old: Entry, new: Entry, threshold: float) -> Change:
    rng = np.random.default_rng(0)
    low, high = interval(resampled(new, rng) / resampled(old, rng))
    change = new.ratio / old.ratio
    verdict: Verdict = "same"
    if change < 1 - threshold and high < 1:
        verdict = "slower"
    elif change > 1 / (1 - threshold) and low > 1:
        verdict = "faster"
    return Change(
        name=name,
        old=old.ratio,
        new=new.ratio,
        change=change,
        low=low,
        high=high,
        verdict=verdict,
    )
