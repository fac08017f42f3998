"""What `served.py` was asked and what it measured; as data, as a table for people."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median
from typing import Literal, Self

from rich.table import Table

from benchmarks.load.against_eager import AgainstEager
from benchmarks.load.step_times import Step
from benchmarks.load.workload import Mode, Model, Wire
from benchmarks.machine.environment import LeftOut

ClientName = Literal["perf_analyzer", "asyncio"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load; every request carries one item."""

    client: ClientName
    protocol: Wire
    model: Model
    mode: Mode
    load: float
    """Requests under way at a time, or requests a second at random moments (Poisson)."""
    throughput_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int
    """Requests that were not answered, or with an error."""
    stable: bool
    """Whether the windows agree; see `benchmarks.load.workload.steady`."""
    client_cpu_share: float
    """What the client took of the CPUs that it shares with the server."""
    cache_hits: int
    """Requests that Triton's response cache answered, no tower being run."""
    steps: tuple[Step, ...]
    """Of the whole run, its beginning and end included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """The smallest concurrency whose throughput is within SATURATED of the sweep's best."""

    model: Model
    protocol: Wire
    concurrency: int
    throughput_per_s: float
    confirmed: bool
    """Whether more was tried, and gave no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two independent clients at the same load, three times each, in turn.

    So a machine that drifts evenly favours neither. The asyncio client takes about twice
    perf_analyzer's CPU time a request, so where a request costs the server a millisecond or two and
    the CPUs are shared, it is the slower one.
    """

    model: Model
    protocol: Wire
    concurrency: int
    perf_analyzer_per_s: tuple[float, ...]
    """Throughput of each of its measurements."""
    asyncio_per_s: tuple[float, ...]
    ratio: float
    """Median of asyncio's / median of perf_analyzer's."""
    agrees: bool
    """Within AGREEMENT."""

    @classmethod
    def of(
        cls,
        model: Model,
        protocol: Wire,
        concurrency: int,
        perf_analyzer: Sequence[float],
        asyncio: Sequence[float],
    ) -> Self:
        """The agreement of throughputs that were measured."""
        ratio = median(asyncio) / median(perf_analyzer)
        return cls(
            model=model,
            protocol=protocol,
            concurrency=concurrency,
            perf_analyzer_per_s=tuple(perf_analyzer),
            asyncio_per_s=tuple(asyncio),
            ratio=ratio,
            agrees=abs(ratio - 1) <= AGREEMENT,
        )


@dataclass(kw_only=True)
class Report:
    """Everything that was measured, and where."""

    environment: dict[str, object]
    bundle: str
    server: str
    runners: dict[str, str] | None
    """By tower; None where a running server was measured, which does not tell."""
    shares_machine: bool
    """Whether clients and server ran on the same CPUs."""
    response_cache: str
    perf_analyzer: str | None
    """Its version; None where there is none, and `left_out` says why."""
    mix: dict[str, str] = field(default_factory=dict)
    """By model: what the requests carry."""
    window_s: float = 0.0
    points: list[Point] = field(default_factory=list)
    saturation: list[Saturation] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    against_eager: AgainstEager | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    seconds: float = 0.0


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


def table(report: Report) -> Table:
    """All points, a section a sweep."""
    made = Table(title=f"{report.bundle} served by {report.server}, one item a request")
    for name in ("model", "client", "load", "/s", "p50 ms", "p95", "p99", "errors"):
        made.add_column(name, justify="left" if name in ("model", "client") else "right")
    made.add_column("steps: queue + compute ms (batch)", min_width=34)
    for (model, protocol), points in groupby(report.points, lambda p: (p.model, p.protocol)):
        made.add_section()
        head = f"{model} {protocol}"
        for point in points:
            made.add_row(head, *_cells(point))
            head = ""
    return made


def _cells(point: Point) -> Iterator[str]:
    yield point.client
    yield f"{point.load:g}{'/s' if point.mode == 'rate' else ''}"
    yield f"{point.throughput_per_s:.1f}{'' if point.stable else ' ~'}"
    yield from (f"{value:.1f}" for value in (point.p50_ms, point.p95_ms, point.p99_ms))
    yield str(point.errors)
    times = ", ".join(f"{step.queue_ms:.1f} + {step.compute_ms:.1f}" for step in point.steps)
    yield f"{times} ({point.steps[-1].mean_batch:.1f})"


def remarks(report: Report) -> Iterator[str]:
    """What the table does not say, a line each."""
    yield from (f"{model}: {mix}" for model, mix in report.mix.items())
    yield "load: requests under way at a time, or a second (/s) at random moments"
    yield "steps: image_preprocess, image_tower; text_tokenize, text_tower; batch: of the tower"
    if any(not point.stable for point in report.points):
        yield "~ windows that differ by more than 10 %"
    hits = sum(point.cache_hits for point in report.points)
    yield f"response cache: {report.response_cache}; answered by it: {hits} requests"
    if report.shares_machine:
        most = max((point.client_cpu_share for point in report.points), default=0.0)
        yield f"clients and server share the machine; a client took up to {most:.0%} of its CPUs"
    for found in report.saturation:
        yield (
            f"saturation: {found.model} {found.protocol} at {found.concurrency} under way, "
            f"{found.throughput_per_s:.1f}/s"
            + ("" if found.confirmed else " (the largest tried: there may be more)")
        )
    for pair in report.agreement:
        yield (
            f"{'agree' if pair.agrees else 'DISAGREE'}: {pair.model} {pair.protocol} at "
            f"{pair.concurrency}: perf_analyzer {each(pair.perf_analyzer_per_s)}/s, asyncio "
            f"{each(pair.asyncio_per_s)}/s, ratio {pair.ratio:.2f}"
        )
    if (eager := report.against_eager) is not None:
        yield (
            f"JPEG 640x480 over gRPC, 16 a request: {eager.served_per_s:.1f} pictures/s, "
            f"{eager.eager_per_s:.1f} by the eager fp32 loop: {eager.speedup:.2f}x; one at a time "
            f"{eager.latency_ms:.1f} ms"
        )
    for left in report.left_out:
        yield f"left out: {left.what}: {left.reason}"


def each(throughputs: Sequence[float]) -> str:
    """Throughputs of repeated measurements, for people."""
    return " and ".join(f"{value:.1f}" for value in throughputs)
