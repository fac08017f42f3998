"""What changed between two results, beyond their noise: for CI on any machine.

Ratios to the reference are compared. The reference ran in turns with the runner, so a machine that
is slower as a whole today changes nothing. The turns of both are drawn again many times
(bootstrap); a change counts as slower when it lies past the threshold and all but 2.5 % of the
draws are slower at all.
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
    """One entry of both results."""

    name: str
    old: float
    """Ratio to the reference."""
    new: float
    change: float
    """new / old: 0.8 is a fifth slower."""
    low: float
    high: float
    """95 % interval of `change`."""
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that two results have in common, and the entries of only one of them."""

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
    """Compare two results files, or the directories of them.

    Args:
        threshold: share of a ratio that may be lost.

    Raises:
        InputError: a file is not of this schema, or the two have nothing in common.
    """
    before, after = Results.read(old), Results.read(new)
    first, second = dict(_entries(before)), dict(_entries(after))
    both = [name for name in first if name in second]
    if not both:
        raise InputError(f"{old} and {new} have no entry in common; were they run alike?")
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
            yield f"different machines ({was}; {now}): ratios need not agree"
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
