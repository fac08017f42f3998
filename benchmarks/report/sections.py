"""Sections of `RESULTS.md`: tables and what is to be said with them."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from benchmarks.load.report import each
from benchmarks.report.results import Document, Latency, Timed, fastest_first


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def machine_section(environment: Document) -> Iterator[str]:
    """Where and with what it was measured."""
    libraries = ", ".join(f"{name} {v}" for name, v in environment["libraries"].items() if v)
    yield (
        f"{environment['machine']}; Linux {environment['kernel']}, Python {environment['python']}; "
        f"{str(environment['date'])[:10]}, commit {str(environment['commit'])[:12]}.\n"
    )
    yield f"{libraries}.\n"


def latency_section(latency: Latency, folder: str) -> Iterator[str]:
    """Limits, every work with its runners, stages, loading and memory."""
    bundle = latency.bundle
    yield f"## Latency of {bundle['name']}\n"
    yield f"{bundle['architecture']}, {bundle['weights']} weights.\n"
    yield f"![latency against batch]({folder}/latency.png)\n"
    for device, limit in latency.limits.items():
        rates = ", ".join(
            f"{name} {rate * 1e3:.0f} GOP/s ({limit['matmul_by'].get(name, 'PyTorch')})"
            for name, rate in limit["matmul_tflops"].items()
        )
        yield (
            f"The {device} itself, in the same run: matrix products {rates}; copying "
            f"{limit['copy_gb_per_s']:.1f} GB/s. `of limit` is the rate of the tower's counted "
            "operations over that of such a product in the runner's precision; `of copy` is the "
            "rate at which its weights are read over that of a copy.\n"
        )
    for tower, batch, length in latency.works():
        found = latency.of(tower, batch, length)
        name = f"{batch} pictures" if tower == "image" else f"{batch} texts of {length} tokens"
        yield f"### {name}\n"
        columns = (
            "runner",
            "ms",
            "x eager fp32",
            "GFLOP/s",
            "of limit",
            "of copy",
            "spread",
            "cosine",
        )
        yield table(columns, [_row(latency, one) for one in fastest_first(found)])
    if latency.stages:
        yield "## Stages\n"
        yield f"![stages]({folder}/stages.png)\n"
        yield table(
            ("stage", "runner", "ms an item", "x transformers, all of it"),
            [
                (
                    s.facts["stage"],
                    s.facts["runner"],
                    f"{s.milliseconds / s.facts['items']:.3f}",
                    f"{s.ratio:.2f}" if s.facts["stage"].endswith(("together", "longest")) else "",
                )
                for s in latency.stages
            ],
        )
    if latency.footprints:
        yield "## Loading and memory\n"
        yield "Both towers in a process of its own; memory of the process, weights included.\n"
        yield table(
            ("runner", "s to load", "s to the first embeddings", "MB loaded", "MB at peak"),
            [
                (
                    f.facts["runner"],
                    f"{f.facts['load_s']:.1f}",
                    f"{f.milliseconds / 1e3:.1f}",
                    f"{f.facts['loaded_bytes'] / 1e6:.0f}",
                    f"{f.facts['peak_bytes'] / 1e6:.0f}",
                )
                for f in latency.footprints
            ],
        )


def _row(latency: Latency, one: Timed) -> tuple[str, ...]:
    fraction = latency.fraction(one)
    return (
        one.facts["runner"],
        f"{one.milliseconds:.1f}",
        f"{one.ratio:.2f}",
        f"{one.facts['gflop'] / one.milliseconds * 1e3:.0f}",
        "" if fraction is None else f"{fraction:.0%}",
        f"{latency.bytes_fraction(one):.0%}",
        f"{one.spread:.0%}",
        f"{one.facts['cosine']:.5f}",
    )


def served_section(served: Document, folder: str) -> Iterator[str]:
    """Load: every point, saturation, and whether two clients agree."""
    yield "## Served\n"
    yield f"![throughput and p99 against concurrency]({folder}/served.png)\n"
    runners = served["runners"] or {}
    told = ", ".join(f"{tower} tower by {runner}" for tower, runner in runners.items())
    mixes = "; ".join(f"{model}: {mix}" for model, mix in served["mix"].items())
    yield f"{served['server']}, {told}. {mixes}. One item a request.\n"
    yield table(
        (
            "model",
            "client",
            "load",
            "a second",
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "errors",
            "queue + compute ms a step",
        ),
        [
            (
                f"{p['model']} {p['protocol']}",
                p["client"],
                f"{p['load']:.3g}{' /s' if p['mode'] == 'rate' else ''}",
                f"{p['throughput_per_s']:.1f}{'' if p['stable'] else ' (unsteady)'}",
                *(f"{p[key]:.1f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
                str(p["errors"]),
                "; ".join(
                    f"{s['model']} {s['queue_ms']:.1f} + {s['compute_ms']:.1f}" for s in p["steps"]
                ),
            )
            for p in served["points"]
        ],
    )
    for one in served["saturation"]:
        more = "" if one["confirmed"] else ", nothing higher was tried"
        yield (
            f"- {one['model']} over {one['protocol']} saturates at {one['concurrency']} requests "
            f"under way: {one['throughput_per_s']:.1f} a second{more}."
        )
    for one in served["agreement"]:
        yield (
            f"- {one['model']} over {one['protocol']}, {one['concurrency']} under way: "
            f"perf_analyzer {each(one['perf_analyzer_per_s'])} a second, the asyncio client "
            f"{each(one['asyncio_per_s'])} (ratio of the medians {one['ratio']:.2f})."
        )
    for left in served["left_out"]:
        yield f"- {left['what']}: {left['reason']}."
    yield ""


def accuracy_section(accuracy: Document, folder: str) -> Iterator[str]:
    """Every runner on labelled pictures."""
    yield "## Accuracy\n"
    yield f"![accuracy against latency]({folder}/accuracy.png)\n"
    yield (
        f"{accuracy['bundle']}: {accuracy['pictures']} pictures, {accuracy['labels']} labels, "
        f"templates {', '.join(accuracy['templates'])}. Intervals of 95 %: top-1 by "
        f"{accuracy['methods']['top1']}, difference to eager fp32 by "
        f"{accuracy['methods']['difference']}.\n"
    )
    columns = (
        "runner",
        "top-1",
        "95 %",
        "top-5",
        "same as fp32",
        "difference",
        "95 %",
        "ms a picture",
        "gate",
    )
    gate = {True: "passed", False: "refused", None: ""}
    yield table(
        columns,
        [
            (
                r["runner"],
                f"{r['top1']:.2%}",
                f"{r['top1_low']:.2%} to {r['top1_high']:.2%}",
                "" if r["top5"] is None else f"{r['top5']:.2%}",
                f"{r['agreement']:.2%}",
                f"{r['difference']:+.2%}",
                f"{r['difference_low']:+.2%} to {r['difference_high']:+.2%}",
                f"{r['image_ms']:.2f}",
                gate[r["passed"]],
            )
            for r in accuracy["rows"]
        ],
    )


def noise_section(latency: Latency) -> Iterator[str]:
    """How far to trust the numbers."""
    low, high = latency.itself()
    spreads = sorted(one.spread for one in latency.towers)
    yield "## Noise\n"
    yield (
        f"The reference measured against itself: {low:.2f} to {high:.2f}. Its median moved by up "
        f"to {latency.drift():.2f}x within one work over the run, which is why ratios are of "
        f"adjacent turns. Half of the entries spread (between quartiles) by less than "
        f"{spreads[len(spreads) // 2]:.0%}, the worst by {spreads[-1]:.0%}. The machine itself, at "
        "the beginning and at the end: "
        + "; ".join(
            f"{name} {rate * 1e3:.0f} and "
            f"{latency.limits_at_end[device]['matmul_tflops'].get(name, 0) * 1e3:.0f} GOP/s"
            for device, limit in latency.limits.items()
            for name, rate in limit["matmul_tflops"].items()
        )
        + f". Load average at the start {latency.environment['load_average'][0]:.2f}.\n"
    )


def summary(latency: Latency) -> Table:
    """What people read on a terminal: every work, fastest first."""
    made = Table(title=f"{latency.bundle['name']} on {latency.environment['machine']}")
    for column in ("work", "runner", "ms", "x eager fp32", "of limit", "spread"):
        made.add_column(column, justify="left" if column in ("work", "runner") else "right")
    for tower, batch, length in latency.works():
        made.add_section()
        for number, one in enumerate(fastest_first(latency.of(tower, batch, length))):
            name = f"{tower} {batch}" + (f" x {length} tokens" if length else "")
            cells = _row(latency, one)
            made.add_row("" if number else name, *cells[:3], cells[4], cells[6])
    return made
