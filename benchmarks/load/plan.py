"""Loads to measure, and the analysis of the measured points."""

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
"""Tolerance of the saturation point: relative distance to the best throughput."""
AGREEMENT = 0.15
"""Tolerated relative difference between the throughputs of two clients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Loads of one model over one protocol."""

    model: Model
    wire: Wire
    concurrency: tuple[int, ...]
    """Numbers of requests in flight, ascending."""
    rates: tuple[float, ...] = ()
    """Rates as fractions of the throughput at saturation."""
    compared: bool = True
    """True: both clients measure the saturation point, if both are available."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sweeps to measure, and their settings."""

    sweeps: tuple[Sweep, ...]
    window_s: float
    """Duration of a window in seconds; see `benchmarks.load.workload.WINDOWS`."""
    compared_window_s: float
    """The same for comparing clients; it must fit many batches, as whole batches are counted."""
    lowest_too: bool
    """True: also compare the clients at the first load of each sweep, not at saturation only."""
    images: int
    """Number of images for `benchmarks.load.against_eager`."""
    rounds: int
    """Number of rounds for `benchmarks.load.against_eager`."""

    @classmethod
    def full(cls, concurrency: Sequence[int] = ()) -> Self:
        """Return a plan of both models over both protocols.

        Args:
            concurrency: numbers of requests in flight. Default: CONCURRENCY.
        """
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
            images=192,
            rounds=5,
        )

    @classmethod
    def quick(cls, concurrency: Sequence[int] = ()) -> Self:
        """Return a plan with fewer points and shorter windows.

        It takes about two minutes for a ViT-B/32 on two CPUs.
        """
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
            images=64,
            rounds=3,
        )


def saturation_of(points: Sequence[Point]) -> Saturation | None:
    """Return the saturation point of one model over one protocol; None without points.

    Only points of concurrency mode count.
    """
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

    The asyncio client uses about twice the CPU time of perf_analyzer per request. It is therefore
    slower if it shares the CPUs with a server that needs only one or two milliseconds per request.
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
