"""What changed between two results, beyond their noise: for CI on any machine.

Compared are ratios to the reference, which ran in turns with what it is compared to, so a machine
that is slower as a whole today changes nothing. The turns of both are drawn again many times
(bootstrap); a change counts as slower when it lies past the threshold and all but 2.5 % of the
draws are slower at all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.markup import escape
from rich.table import Table

from benchmarks.report.results import Latency, Timed, interval
from serving.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One entry in both results."""

    name: str
    old: float
    """Ratio to the reference."""
    new: float
    change: float
    """new / old: 0.8 is a fifth slower."""
    low: float
    high: float
    """95 % interval of `change`."""
    verdict: Literal["slower", "faster", "same"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that two results have in common, and what one of them lacks."""

    threshold: float
    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    warnings: list[str]

    @property
    def slower(self) -> list[Change]:
        """What should fail a CI job."""
        return [change for change in self.changes if change.verdict == "slower"]


def compare(old: Path, new: Path, threshold: float = 0.15) -> Comparison:
    """Compare two `latency.json`, or two folders that hold one.

    Raises:
        InputError: a file is not of this suite, or the two have nothing in common.
    """
    before, after = (Latency(p / "latency.json" if p.is_dir() else p) for p in (old, new))
    first, second = (
        {one.name: one for one in (*results.towers, *results.stages)} for results in (before, after)
    )
    both = [name for name in first if name in second]
    if not both:
        raise InputError(f"{old} and {new} have no entry in common; were they run alike?")
    warnings = []
    if (was := before.environment["machine"]) != (now := after.environment["machine"]):
        warnings.append(f"different machines ({was}; {now}): ratios need not agree")
    if before.bundle["weights_sha256"] != after.bundle["weights_sha256"]:
        warnings.append(f"different weights: {before.bundle['name']}, {after.bundle['name']}")
    warnings += [
        f"{path}: {warning}"
        for path, results in ((old, before), (new, after))
        if (warning := results.disturbed())
    ]
    return Comparison(
        threshold=threshold,
        changes=[_change(first[name], second[name], threshold) for name in both],
        only_old=[name for name in first if name not in second],
        only_new=[name for name in second if name not in first],
        warnings=warnings,
    )


def _change(old: Timed, new: Timed, threshold: float) -> Change:
    rng = np.random.default_rng(0)
    low, high = interval(new.ratios(rng) / old.ratios(rng))
    change = new.ratio / old.ratio
    verdict: Literal["slower", "faster", "same"] = "same"
    if change < 1 - threshold and high < 1:
        verdict = "slower"
    elif change > 1 / (1 - threshold) and low > 1:
        verdict = "faster"
    return Change(
        name=new.name,
        old=old.ratio,
        new=new.ratio,
        change=change,
        low=low,
        high=high,
        verdict=verdict,
    )


def table(found: Comparison) -> Table:
    """What changed, worst first; what did not is counted."""
    moved = sorted((c for c in found.changes if c.verdict != "same"), key=lambda c: c.change)
    same = len(found.changes) - len(moved)
    title = f"{len(moved)} of {len(found.changes)} changed by more than {found.threshold:.0%}"
    result = Table(title=f"{title}; {same} did not")
    for column in ("entry", "old", "new", "new / old", "95 %", ""):
        result.add_column(column, justify="left" if column in ("entry", "") else "right")
    for c in moved:
        span = f"{c.low:.2f} to {c.high:.2f}"
        cells = (f"{c.old:.2f}x", f"{c.new:.2f}x", f"{c.change:.2f}", span, c.verdict)
        result.add_row(escape(c.name), *cells)
    return result
