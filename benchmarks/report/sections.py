"""Sections of `RESULTS.md`: tables and their explanations."""

from collections.abc import Iterator, Sequence

from benchmarks.report.analysis import (
    bytes_fraction,
    drift,
    each,
    fraction,
    itself,
    of,
    tflops,
    works,
)
from serving.util.results import AccuracyRun, Environment, LatencyRun, LoadRun, TowerLatency


def slug(run: LatencyRun) -> str:
    """Return the suffix of the names of a run's plots, such as `random-ViT-B-32-cuda`."""
    device = [run.device] if run.device != "cpu" else []
    matrix = [run.matrix] if run.matrix != "short" else []
    return "-".join([run.model.name, *device, *matrix])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def machine_section(environment: Environment) -> Iterator[str]:
    """Describe the machine and the libraries."""
    libraries = ", ".join(f"{name} {v}" for name, v in environment.libraries.items() if v)
    gpu = f"; {environment.gpu.name}, driver {environment.driver}" if environment.gpu else ""
    yield (
        f"{environment.machine}{gpu}; Linux {environment.kernel}, Python {environment.python}; "
        f"{environment.date[:10]}, commit {str(environment.commit)[:12]}.\n"
    )
    yield f"{libraries}.\n"


def latency_section(run: LatencyRun, directory: str) -> Iterator[str]:
    """Show the limits of the device, every work with its runners, stages, loading and memory."""
    where = "" if run.device == "cpu" else f", {run.device}"
    yield f"## Latency of {run.model.name}{where}{', every batch' * (run.matrix == 'full')}\n"
    yield f"{run.model.architecture}, {run.model.weights} weights.\n"
    yield f"![latency against batch]({directory}/latency-{slug(run)}.png)\n"
    rates = ", ".join(
        f"{name} {rate:.3g} ({run.limits.matmul_by.get(name, 'PyTorch')})"
        for name, rate in run.limits.matmul_tflops.items()
    )
    yield (
        f"Limits of the device in the same run: matrix products in 1e12 operations/s: {rates}; "
        f"copying {run.limits.copy_gb_per_s:.1f} GB/s. `of limit` is the rate of the tower's "
        "operations, relative to such a product in the runner's precision. `of copy` is the rate "
        "of reading its weights, relative to a copy. `cosine` is the smallest cosine to the "
        "reference's embeddings of the same batch.\n"
    )
    on_device = any(one.device_timing for one in run.towers)
    columns = ["runner", "ms", *(["ms on the device"] if on_device else [])]
    columns += [f"x {run.reference}", "TFLOP/s", "of limit", "of copy", "spread", "cosine"]
    for tower, batch, length in works(run):
        name = f"{batch} images" if tower == "image" else f"{batch} texts of {length} tokens"
        yield f"### {name}\n"
        found = of(run, (tower, batch, length))
        yield table(columns, [list(_cells(run, one, on_device)) for one in found])
    if run.stages:
        yield from _stages(run, directory)
    if run.footprints:
        yield from _footprints(run)
    if run.left_out:
        yield "### Left out\n"
        yield "\n".join(f"- {left.what}: {left.reason}" for left in run.left_out) + "\n"
    yield from _noise(run)


def _cells(run: LatencyRun, one: TowerLatency, on_device: bool) -> Iterator[str]:
    share, copied = fraction(run, one), bytes_fraction(run, one)
    yield one.runner
    yield f"{one.timing.milliseconds:.2f}"
    if on_device:
        yield f"{one.device_timing.milliseconds:.2f}" if one.device_timing else ""
    yield f"{one.ratio:.2f}"
    yield f"{tflops(one):.3g}"
    yield "" if share is None else f"{share:.0%}"
    yield "" if copied is None else f"{copied:.0%}"
    yield f"{one.timing.spread:.0%}"
    yield f"{one.cosine:.5f}"


def _stages(run: LatencyRun, directory: str) -> Iterator[str]:
    yield "### Stages\n"
    yield f"![stages]({directory}/stages-{slug(run)}.png)\n"
    yield table(
        ("stage", "runner", "ms per item", "x transformers, whole pipeline"),
        [
            (
                s.stage,
                s.runner,
                f"{s.timing.milliseconds / s.items:.3f}",
                f"{s.ratio:.2f}" if s.stage.endswith(("together", "longest")) else "",
            )
            for s in run.stages
        ],
    )


def _footprints(run: LatencyRun) -> Iterator[str]:
    yield "### Loading and memory\n"
    yield "Both towers in a separate process; memory of the process, including weights.\n"
    yield table(
        ("runner", "s to load", "s to the first embeddings", "MB loaded", "MB at peak"),
        [
            (
                f.runner,
                f"{f.load_s:.1f}",
                f"{f.total_s:.1f}",
                f"{f.loaded_bytes / 1e6:.0f}",
                f"{f.peak_bytes / 1e6:.0f}",
            )
            for f in run.footprints
        ],
    )


def _noise(run: LatencyRun) -> Iterator[str]:
    """Describe the noise of the measurements."""
    spreads = sorted(one.timing.spread for one in run.towers)
    if not spreads:
        return
    low, high = itself(run)
    yield "### Noise\n"
    text = (
        f"The reference measured against itself: {low:.2f} to {high:.2f}. Its median on the same "
        f"work varied by up to {drift(run):.2f}x over the run; ratios are therefore computed from "
        "adjacent turns. The spread (distance of the quartiles) is below "
        f"{spreads[len(spreads) // 2]:.0%} for half of the entries, and at most {spreads[-1]:.0%}."
    )
    if (last := run.limits_at_end) is not None:
        rates = "; ".join(
            f"{name} {rate:.3g} and {last.matmul_tflops.get(name, 0):.3g}"
            for name, rate in run.limits.matmul_tflops.items()
        )
        text += f" Matrix products at the beginning and at the end: {rates}."
    yield f"{text} Load average at the start: {run.environment.load_average[0]:.2f}.\n"


def load_section(run: LoadRun, directory: str) -> Iterator[str]:
    """Show every point, the saturation, and the agreement of two clients."""
    yield "## Served\n"
    yield f"![throughput and p99 against concurrency]({directory}/load.png)\n"
    runners = run.runners or {}
    towers = ", ".join(f"{tower} tower by {runner}" for tower, runner in runners.items())
    mixes = "; ".join(f"{model}: {mix}" for model, mix in run.mix.items())
    yield f"{run.bundle}, {run.server}, {towers}. {mixes}. One item per request.\n"
    columns = ("model", "client", "load", "items/s", "p50 ms", "p95 ms", "p99 ms", "errors")
    yield table(
        (*columns, "queue + compute ms per step"),
        [
            (
                f"{p.model} {p.protocol}",
                p.client,
                f"{p.load:.3g}{' /s' if p.mode == 'rate' else ''}",
                f"{p.throughput_per_s:.1f}{'' if p.stable else ' (unsteady)'}",
                *(f"{value:.1f}" for value in (p.p50_ms, p.p95_ms, p.p99_ms)),
                str(p.errors),
                "; ".join(f"{s.model} {s.queue_ms:.1f} + {s.compute_ms:.1f}" for s in p.steps),
            )
            for p in run.points
        ],
    )
    for one in run.saturation:
        more = "" if one.confirmed else " (the largest concurrency tried)"
        yield (
            f"- {one.model} over {one.protocol} saturates at {one.concurrency} requests in "
            f"flight: {one.throughput_per_s:.1f} items/s{more}."
        )
    for pair in run.agreement:
        yield (
            f"- {pair.model} over {pair.protocol}, {pair.concurrency} in flight: perf_analyzer "
            f"{each(pair.perf_analyzer_per_s)} items/s, the asyncio client "
            f"{each(pair.asyncio_per_s)} items/s (ratio of the medians {pair.ratio:.2f})."
        )
    for left in run.left_out:
        yield f"- {left.what}: {left.reason}."
    yield ""


def accuracy_section(run: AccuracyRun, directory: str) -> Iterator[str]:
    """Show the accuracy of every runner."""
    yield "## Accuracy\n"
    yield f"![accuracy against latency]({directory}/accuracy.png)\n"
    yield (
        f"{run.bundle}: {run.images} images, {run.labels} labels, templates "
        f"{', '.join(run.templates)}. 95 % intervals: top-1 by {run.methods['top1']}, "
        f"difference to eager fp32 by {run.methods['difference']}.\n"
    )
    gate = {True: "passed", False: "failed", None: ""}
    columns = ("runner", "top-1", "95 %", "top-5", "same as fp32", "difference", "95 %")
    yield table(
        (*columns, "ms per image", "gate"),
        [
            (
                r.runner,
                f"{r.top1:.2%}",
                f"{r.top1_low:.2%} to {r.top1_high:.2%}",
                "" if r.top5 is None else f"{r.top5:.2%}",
                f"{r.agreement:.2%}",
                f"{r.difference:+.2%}",
                f"{r.difference_low:+.2%} to {r.difference_high:+.2%}",
                f"{r.image_ms:.2f}",
                gate[r.passed],
            )
            for r in run.rows
        ],
    )
