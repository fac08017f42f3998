"""What the results of a machine say: a folder of the JSON files that the benchmarks wrote.

`latency.json` is pytest-benchmark's, of `test_latency.py`, `test_stages.py`, `test_footprint.py`;
`served.json` and `accuracy.json` are those of the commands of these names.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from serving.errors import InputError

Document = dict[str, Any]

_RESAMPLES = 2000
_UNQUIET = 1.5
"""A reference that moves by more says that something else used the machine, or that a runner does
not rest when it has run; found by it: 1.3 to 2.5 with ONNX Runtime's threads spinning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Something timed in turns with a reference."""

    name: str
    """Of the entry, as pytest-benchmark calls it: what it can be found by."""
    seconds: tuple[float, ...]
    """Of all runs, turn after turn, each of as many."""
    reference_seconds: tuple[tuple[float, ...], ...]
    """Of the runs of each turn."""
    facts: Document
    """What the test told of it: `extra_info`."""

    @property
    def milliseconds(self) -> float:
        """Median."""
        return median(self.seconds) * 1e3

    @property
    def reference_milliseconds(self) -> float:
        """Median."""
        return float(np.median(self.reference_seconds)) * 1e3

    @property
    def ratio(self) -> float:
        """How many times faster than the reference: median over pairs of adjacent turns."""
        return float(np.median(self._quotients()))

    @property
    def spread(self) -> float:
        """Between the quartiles, as a share of the median."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float((high - low) / median(self.seconds))

    def ratios(self, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
        """`ratio` of turns drawn again (bootstrap): float64 [resamples]."""
        every = self._quotients()
        drawn = rng.integers(0, len(every), (_RESAMPLES, len(every)))
        ratios: np.ndarray[Any, np.dtype[np.float64]] = np.median(every[drawn], axis=1)
        return ratios

    def _quotients(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        ours = np.reshape(self.seconds, (len(self.reference_seconds), -1))
        every: np.ndarray[Any, np.dtype[np.float64]] = np.divide(
            np.median(self.reference_seconds, axis=1), np.median(ours, axis=1)
        )
        return every


class Latency:
    """A `latency.json`."""

    def __init__(self, file: Path) -> None:
        self.document = read(file)
        if "benchmarks" not in self.document or "limits" not in self.document:
            raise InputError(
                f"{file} is not of this suite; expected what `python -m benchmarks latency` wrote"
            )
        every = [_timed(entry) for entry in self.document["benchmarks"]]
        self.towers = [one for one in every if one.facts.get("kind") == "tower"]
        self.stages = [one for one in every if one.facts.get("kind") == "stage"]
        self.footprints = [one for one in every if one.facts.get("kind") == "footprint"]
        self.limits: dict[str, Document] = self.document["limits"]
        self.limits_at_end: dict[str, Document] = self.document["limits_at_end"]
        self.environment: Document = self.document["machine_info"]["environment"]
        self.bundle: Document = self.document["bundle"]

    def of(self, tower: str, batch: int, length: int | None) -> list[Timed]:
        """The entries of all runners on some work."""
        work = (tower, batch, length)
        return [
            one
            for one in self.towers
            if tuple(one.facts[key] for key in ("tower", "batch", "length")) == work
        ]

    def works(self) -> list[tuple[str, int, int | None]]:
        """Tower, batch and length of all that was timed: pictures first, ascending."""
        found = {(t.facts["tower"], t.facts["batch"], t.facts["length"]) for t in self.towers}
        return sorted(found, key=lambda work: (work[0], work[2] or 0, work[1]))

    def limit(self, one: Timed) -> float | None:
        """1e12 operations a second that this machine multiplies in the precision of an entry."""
        runtime, _, precision = one.facts["runner"].partition(":")
        device = "cuda" if "cuda" in runtime or "tensorrt" in runtime else "cpu"
        rates: dict[str, float] = self.limits.get(device, {}).get("matmul_tflops", {})
        name = precision.partition("-")[0]
        # CPUs have no products of half floats: runtimes turn such graphs into float32.
        return rates.get("fp32" if device == "cpu" and name == "fp16" else name)

    def fraction(self, one: Timed) -> float | None:
        """Achieved rate of operations, as a share of the limit."""
        limit = self.limit(one)
        if not limit:
            return None
        return float(one.facts["gflop"] / one.milliseconds / limit)

    def bytes_fraction(self, one: Timed) -> float:
        """Rate at which weights are read, as a share of what a copy moves; limits small batches."""
        rate = self.limits["cpu"]["copy_gb_per_s"]
        return float(one.facts["weight_bytes"] / 1e9 / (one.milliseconds / 1e3) / rate)

    def drift(self) -> float:
        """How far the reference moved: of each work the slowest entry's median of it over the
        fastest's, and of these the largest."""
        medians: dict[Any, list[float]] = {}
        for one in self.towers:
            work = tuple(one.facts[key] for key in ("tower", "batch", "length"))
            medians.setdefault(work, []).append(one.reference_milliseconds)
        return max((max(times) / min(times) for times in medians.values()), default=1.0)

    def disturbed(self) -> str | None:
        """A warning, where the reference moved so far that ratios are not to be relied on."""
        if (drift := self.drift()) <= _UNQUIET:
            return None
        return (
            f"the machine was not quiet: the time of the same work by eager fp32 moved by "
            f"{drift:.2f}x over the run; measure again before relying on a ratio"
        )

    def itself(self) -> tuple[float, float]:
        """Lowest and highest ratio of the reference to itself, measured like any runner."""
        ratios = [one.ratio for one in self.towers if one.facts["runner"] == "eager:fp32"]
        return min(ratios, default=1.0), max(ratios, default=1.0)


def read(file: Path) -> Document:
    """A JSON object.

    Raises:
        InputError: there is no such file, or it is no JSON object.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as results: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(document).__name__}")
    return document


def _timed(entry: Document) -> Timed:
    facts = dict(entry["extra_info"])
    reference = facts.pop("reference_seconds", [entry["stats"]["data"]])
    return Timed(
        name=entry["name"],
        seconds=tuple(entry["stats"]["data"]),
        reference_seconds=tuple(map(tuple, reference)),
        facts=facts,
    )


def interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """Of 95 %."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def fastest_first(found: list[Timed]) -> list[Timed]:
    """By ratio, so that drift between entries does not decide."""
    return sorted(found, key=lambda one: -one.ratio)
