"""The loads that are put on a server, and what follows from the points measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

from benchmarks.load.workload import Model, Wire
from serving.util.results import Agreement, Point, Saturation

MODELS: tuple[Model, ...] = ("clip_image", "clip_text")
WIRES: tuple[Wire, ...] = ("grpc", "http")
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
RATES = (0.5, 0.8, 0.95)
"""Fractions of the throughput at saturation."""
SATURATED = 0.05
"""What the saturation point may lack of the best throughput."""
AGREEMENT = 0.15
"""By how much the throughputs of two clients may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Loads of one model over one protocol."""

    model: Model
    wire: Wire
    concurrency: tuple[int, ...]
    """Ascending."""
    rates: tuple[float, ...] = ()
    """Fractions of the throughput at saturation."""
    compared: bool = True
    """Whether both clients measure it, where there are two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured."""

    sweeps: tuple[Sweep, ...]
    window_s: float
    """Seconds of a window; see `benchmarks.load.workload.WINDOWS`."""
    compared_window_s: float
    """The same where clients are compared: many batches, since whole ones are counted."""
    lowest_too: bool
    """Whether the clients are compared at each sweep's first load, not at saturation only."""
    pictures: int
    rounds: int
    """Both of `benchmarks.load.against_eager`."""

    @classmethod
    def full(cls, concurrency: Sequence[int] = ()) -> Self:
        """Both models over both protocols; `concurrency` instead of CONCURRENCY."""
        levels = tuple(sorted(set(concurrency))) or CONCURRENCY
        sweeps = tuple(
            Sweep(model=model, wire=wire, concurrency=levels, rates=RATES)
            for model in MODELS
            for wire in WIRES
        )
        return cls(
            sweeps=sweeps,
            window_s=4.0,
            compared_window_s=4.0,
            lowest_too=True,
            pictures=192,
            rounds=5,
        )

    @classmethod
    def quick(cls, concurrency: Sequence[int] = ()) -> Self:
        """Fewer points, shorter windows: about two minutes of a ViT-B/32 on two CPUs."""
        levels = tuple(sorted(set(concurrency)))
        sweeps = (
            Sweep(
                model="clip_image",
                wire="grpc",
                concurrency=levels or (1, 4, 8, 16),
                rates=(0.8,),
            ),
            Sweep(model="clip_image", wire="http", concurrency=levels or (8,), compared=False),
            Sweep(model="clip_text", wire="grpc", concurrency=levels or (1, 4, 16)),
            Sweep(model="clip_text", wire="http", concurrency=levels or (16,), compared=False),
        )
        return cls(
            sweeps=sweeps,
            window_s=1.0,
            compared_window_s=2.5,
            lowest_too=False,
            pictures=64,
            rounds=3,
        )


def saturation_of(points: Sequence[Point]) -> Saturation | None:
    """Of the concurrency points of one model over one protocol; None where there are none."""
    swept = sorted((p for p in points if p.mode == "concurrency"), key=lambda p: p.load)
    if not swept:
        return None
    best = max(point.throughput_per_s for point in swept)
    first = next(p for p in swept if p.throughput_per_s >= (1 - SATURATED) * best)
    return Saturation(
        model=first.model,
        protocol=first.protocol,
        concurrency=int(first.load),
        throughput_per_s=first.throughput_per_s,
        confirmed=first is not swept[-1],
    )


def agreement_of(
    sweep: Sweep, concurrency: int, perf_analyzer: Sequence[float], asyncio: Sequence[float]
) -> Agreement:
    """Compare the throughputs that two clients measured.

    The asyncio client takes about twice perf_analyzer's CPU time a request, so where a request
    costs the server a millisecond or two and the CPUs are shared, it is the slower one.
    """
    ratio = median(asyncio) / median(perf_analyzer)
    return Agreement(
        model=sweep.model,
        protocol=sweep.wire,
        concurrency=concurrency,
        perf_analyzer_per_s=tuple(perf_analyzer),
        asyncio_per_s=tuple(asyncio),
        ratio=ratio,
        agrees=abs(ratio - 1) <= AGREEMENT,
    )
