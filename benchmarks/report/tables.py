"""Tables of results for the terminal."""

from collections.abc import Iterator
from itertools import groupby

from benchmarks.report.analysis import each, fraction, of, tflops, works
from benchmarks.report.compare import Comparison
from serving.cli.console import Table, add, table
from serving.util.results import AccuracyRun, LatencyRun, LoadRun, Point, TowerLatency

_GATE = {True: "passed", False: "failed", None: "-"}


def latency_table(run: LatencyRun) -> Table:
    """Return a table of every work with its runners, fastest first."""
    on_device = any(one.device_timing for one in run.towers)
    columns = ["work", "runner", ">ms", *([">ms device"] if on_device else [])]
    columns += [f">x {run.reference}", ">TFLOP/s", ">of limit", ">spread", ">cosine"]
    made = table(f"{run.model.name} on {run.environment.machine}, {run.device}", columns)
    for tower, batch, length in works(run):
        made.add_section()
        for number, one in enumerate(of(run, (tower, batch, length))):
            name = f"{tower} {batch}" + (f" x {length} tokens" if length else "")
            add(made, ("" if number else name, *_latency_cells(run, one, on_device)))
    return made


def _latency_cells(run: LatencyRun, one: TowerLatency, on_device: bool) -> Iterator[str]:
    share = fraction(run, one)
    yield one.runner
    yield f"{one.timing.milliseconds:.2f}"
    if on_device:
        yield f"{one.device_timing.milliseconds:.2f}" if one.device_timing else ""
    yield f"{one.ratio:.2f}"
    yield f"{tflops(one):.3g}"
    yield "" if share is None else f"{share:.0%}"
    yield f"{one.timing.spread:.0%}"
    yield f"{one.cosine:.5f}"


def load_table(run: LoadRun) -> Table:
    """Return a table of all points, with one section per sweep."""
    columns = ("model", "client", ">load", ">items/s", ">p50 ms", ">p95", ">p99", ">errors")
    steps = "steps: queue + compute ms (batch)"
    title = f"{run.bundle} served by {run.server}, one item per request"
    made = table(title, (*columns, steps))
    made.columns[-1].min_width = 34
    for (model, protocol), points in groupby(run.points, lambda p: (p.model, p.protocol)):
        made.add_section()
        head = f"{model} {protocol}"
        for point in points:
            add(made, (head, *_load_cells(point)))
            head = ""
    return made


def _load_cells(point: Point) -> Iterator[str]:
    yield point.client
    yield f"{point.load:g}{'/s' if point.mode == 'rate' else ''}"
    yield f"{point.throughput_per_s:.1f}{'' if point.stable else ' ~'}"
    yield from (f"{value:.1f}" for value in (point.p50_ms, point.p95_ms, point.p99_ms))
    yield str(point.errors)
    times = ", ".join(f"{step.queue_ms:.1f} + {step.compute_ms:.1f}" for step in point.steps)
    yield f"{times} ({point.steps[-1].mean_batch:.1f})"


def load_remarks(run: LoadRun) -> Iterator[str]:
    """Yield explanations of the load table."""
    yield from (f"{model}: {mix}" for model, mix in run.mix.items())
    yield "load: requests in flight, or requests/s at random times"
    yield "steps: image_preprocess, image_tower; text_tokenize, text_tower; batch: tower's mean"
    if any(not point.stable for point in run.points):
        yield "~: windows differ by more than 10 %"
    hits = sum(point.cache_hits for point in run.points)
    yield f"response cache: {run.response_cache}; {hits} hits"
    if run.shares_machine:
        most = max((point.client_cpu_share for point in run.points), default=0.0)
        yield f"clients and server share the machine; a client used up to {most:.0%} of its CPUs"
    for found in run.saturation:
        yield (
            f"saturation: {found.model} {found.protocol} at {found.concurrency} in flight, "
            f"{found.throughput_per_s:.1f}/s"
            + ("" if found.confirmed else " (the largest concurrency tried)")
        )
    for pair in run.agreement:
        yield (
            f"{'agree' if pair.agrees else 'DISAGREE'}: {pair.model} {pair.protocol} at "
            f"{pair.concurrency}: perf_analyzer {each(pair.perf_analyzer_per_s)}/s, asyncio "
            f"{each(pair.asyncio_per_s)}/s, ratio {pair.ratio:.2f}"
        )
    if (eager := run.against_eager) is not None:
        yield (
            f"JPEG files of 640x480 over gRPC, 16 per request: {eager.served_per_s:.1f} images/s; "
            f"eager fp32 loop: {eager.eager_per_s:.1f} images/s; speedup {eager.speedup:.2f}x; "
            f"one image at a time: {eager.latency_ms:.1f} ms"
        )
    for left in run.left_out:
        yield f"left out: {left.what}: {left.reason}"


def accuracy_table(run: AccuracyRun) -> Table:
    """Return a table with one row per runner."""
    counts = f"{run.images} images, {run.labels} labels x {len(run.templates)} templates"
    made = table(
        f"{run.bundle} on {run.dataset}: {counts}",
        (
            *("runner", ">top-1", ">top-5", ">agrees"),
            *(">to fp32", ">gate", ">image ms", ">text ms"),
        ),
        caption=f"in brackets: 95 % interval; ms per item in batches of {run.image_batch} images "
        f"or {run.text_batch} texts",
    )
    for number, row in enumerate(run.rows):
        low, high = row.difference_low, row.difference_high
        away = f"{row.difference:+.2%} [{100 * low:+.2f}, {100 * high:+.2f}]"
        cells = (
            row.runner,
            f"{row.top1:.2%} [{100 * row.top1_low:.1f}, {100 * row.top1_high:.1f}]",
            "-" if row.top5 is None else f"{row.top5:.2%}",
            f"{row.agreement:.2%}",
            away if number else "-",  # the first row is the reference
            _GATE[row.passed],
            f"{row.image_ms:.2f}",
            f"{row.text_ms:.2f}",
        )
        add(made, cells)
    return made


def accuracy_remarks(run: AccuracyRun) -> Iterator[str]:
    """Yield explanations of the accuracy table."""
    yield from (f"note: {note}" for note in run.notes)
    yield from (f"left out: {one.what}: {one.reason}" for one in run.left_out)
    yield from (f"skipped {reason}" for reason in run.skipped[:5])
    if run.skipped:
        yield f"skipped {len(run.skipped)} images that cannot be read"


def comparison_table(found: Comparison) -> Table:
    """Return a table of the changed entries, worst first; unchanged ones are only counted."""
    moved = sorted((c for c in found.changes if c.verdict != "same"), key=lambda c: c.change)
    same = len(found.changes) - len(moved)
    title = f"{len(moved)} of {len(found.changes)} changed by more than {found.threshold:.0%}"
    columns = ("entry", ">old", ">new", ">new / old", ">95 %", "")
    made = table(f"{title}; {same} did not", columns)
    for c in moved:
        span = f"{c.low:.2f} to {c.high:.2f}"
        cells = (f"{c.old:.2f}x", f"{c.new:.2f}x", f"{c.change:.2f}", span, c.verdict)
        add(made, (c.name, *cells))
    return made
