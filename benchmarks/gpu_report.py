"""What `gpu.py` was asked and what it measured, on what machine; as JSON, as tables for people."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from rich.table import Table

from benchmarks.machine.environment import LeftOut
from benchmarks.machine.limits import Limits
from serving.bundles.manifest import Tower, Verdict

IMAGE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TEXT_BATCHES = (1, 32, 256)
SHORT_TEXT = 16
"""Tokens; the other length that is timed is the context length."""


Work = tuple[int, int | None]
"""Batch and, of texts, length in tokens."""

_VERDICT = {True: "passed", False: "refused"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured."""

    models: Sequence[str] = ("random:ViT-B-32", "random:ViT-L-14")
    batches: Sequence[int] = ()
    """Of pictures and of texts; none are IMAGE_BATCHES and TEXT_BATCHES."""
    rounds: int = 9
    budget: float = 540.0
    """Seconds after which nothing new is started, but the device measured once more."""
    runners: Sequence[str] = ("*",)
    """Patterns of names, such as `*-cuda:*`."""
    device: str = "cuda"
    """`cpu` takes the same way without a GPU."""
    bundles: Path = Path("build/gpu")
    """Where models are exported to."""
    matmul_size: int = 8192
    copy_bytes: int = 2 << 30

    def works(self, tower: Tower, context_length: int) -> list[Work]:
        """Ascending batches; all of one length, then all of another."""
        if tower == "image":
            return [(batch, None) for batch in sorted(self.batches or IMAGE_BATCHES)]
        lengths = sorted({context_length, min(SHORT_TEXT, context_length)}, reverse=True)
        batches = sorted(self.batches or TEXT_BATCHES)
        return [(batch, length) for length in lengths for batch in batches]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The gate's verdict on a runner: a few probes against eager float32 on the CPU."""

    model: str
    tower: Tower
    verdict: Verdict
    seconds: float
    """To make and open the runner and run the probes: export, loading, compiling for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A runner on a batch; times are medians."""

    model: str
    tower: Tower
    batch: int
    length: int | None
    """Of texts, in tokens."""
    runner: str
    runtime_version: str
    passed: bool
    """The gate. What it refused is timed all the same."""
    min_cosine: float
    first_call_seconds: float
    """Not in the medians; of a compiled runner it may be compilation for this shape."""
    milliseconds_host: float
    """`run(batch)`: NumPy in, NumPy out, transfers from and to pageable memory included."""
    milliseconds_host_range: tuple[float, float]
    """The fastest round and the slowest."""
    milliseconds_device: float | None
    """The batch being on the device already and the result staying there; PyTorch's runners."""
    milliseconds_device_range: tuple[float, float] | None
    gflop: float
    """1e9 operations, counted: see `benchmarks.machine.limits.count_flops`."""
    tflops: float
    """1e12 operations a second: by milliseconds_device where that was measured, else by _host."""
    matmul_tflops: float | None
    """What the device reached in a large product of that precision in this run; None of runners
    elsewhere than on it, and where it was not measured."""
    fraction: float | None
    """tflops / matmul_tflops."""


@dataclass(kw_only=True)
class Report:
    """Everything that was measured, and where."""

    environment: dict[str, object]
    plan: Plan
    limits: Limits | None = None
    limits_at_end: Limits | None = None
    """How much the device itself changed meanwhile."""
    gates: list[Gate] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        """One document, indented."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"


def tables(report: Report) -> Iterator[Table]:
    """The device, the gate, and a table a model, tower and text length, a batch's fastest first."""
    if report.limits is not None:
        yield _limits(report.limits, report.limits_at_end)
    if report.gates:
        yield _gates(report)
    kinds = sorted({(row.model, row.tower, row.length or 0) for row in report.rows})
    for model, tower, length in kinds:
        title = f"{model}, {tower} tower" + (f", {length} tokens" if length else "")
        table = Table(title=title)
        for column in ("batch", "runner"):
            table.add_column(column, justify="right" if column == "batch" else "left")
        for column in ("ms device", "ms host", "items/s", "TFLOP/s", "matmul", "of it", "cosine"):
            table.add_column(column, justify="right")
        table.add_column("gate")
        mine = [
            r for r in report.rows if (r.model, r.tower, r.length or 0) == (model, tower, length)
        ]
        mine.sort(key=lambda row: (row.batch, row.milliseconds_host))
        for batch, rows in groupby(mine, key=lambda row: row.batch):
            for number, row in enumerate(rows):
                table.add_row(str(batch) if number == 0 else "", *_cells(row))
            table.add_section()
        yield table


def _gates(report: Report) -> Table:
    table = Table(title="The gate, and what is in no median: opening, compiling, first calls")
    for column in ("model", "tower", "runner", "gate"):
        table.add_column(column)
    for column in ("cosine", "difference", "s to open and judge", "s of first calls"):
        table.add_column(column, justify="right")
    for gate in report.gates:
        mine = (gate.model, gate.tower, gate.verdict.runner)
        first = sum(
            r.first_call_seconds for r in report.rows if (r.model, r.tower, r.runner) == mine
        )
        table.add_row(
            *mine,
            _VERDICT[gate.verdict.passed],
            f"{gate.verdict.min_cosine:.6f}",
            f"{gate.verdict.max_abs_difference:.1e}",
            f"{gate.seconds:.1f}",
            f"{first:.1f}",
        )
    return table


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        row.runner,
        number(row.milliseconds_device, ".2f"),
        number(row.milliseconds_host, ".2f"),
        number(row.batch / row.milliseconds_host * 1e3, ",.0f"),
        number(row.tflops, ".3g"),
        number(row.matmul_tflops, ".3g"),
        number(row.fraction, ".0%"),
        number(row.min_cosine, ".5f"),
        _VERDICT[row.passed],
    )


def _limits(first: Limits, last: Limits | None) -> Table:
    table = Table(title=f"The device itself: products of {first.matmul_size} x {first.matmul_size}")
    for column in ("", "at the start", "at the end"):
        table.add_column(column, justify="right" if column else "left")
    for precision, rate in first.matmul_tflops.items():
        end = f"{last.matmul_tflops[precision]:.3g}" if last else ""
        unit = "TOP/s" if precision == "int8" else "TFLOP/s"
        table.add_row(f"{precision}, {unit}", f"{rate:.3g}", end)
    end = f"{last.copy_gb_per_s:.4g}" if last else ""
    table.add_row("copy, GB/s", f"{first.copy_gb_per_s:.4g}", end)
    return table
