"""Plots of results: latency against batch, load, stages, accuracy against latency."""

import math
from pathlib import Path
from typing import Any

from benchmarks.report.analysis import multiplied_in, works
from benchmarks.report.sections import slug
from serving.runners.spec import RunnerSpec
from serving.util.extras import require
from serving.util.files import new_file
from serving.util.results import AccuracyRun, LatencyRun, LoadRun, Results, TowerLatency

_COLORS = {
    "eager": "#555555",
    "torchscript": "#8c8c8c",
    "compiled": "#b0b0b0",
    "transformers": "#111111",
    "transformers-longest": "#9467bd",
    "onnxruntime-plain": "#7fb3d9",
    "onnxruntime": "#1f6fb4",
    "openvino": "#d9641c",
    "tensorrt": "#3a8f3a",
}
"""Color by prefix of the runtime; the longest matching prefix applies."""
_COLUMNS = 3
"""Maximum number of panels per row."""
_LINE = 0.047
"""Height of a label, as a share of the height of a panel."""
_DASHES = {"fp32": "-", "tf32": "-", "bf16": "-.", "fp16": ":", "int8": "--"}


def draw(results: Results, directory: Path) -> list[Path]:
    """Write a PNG file for each part of the results.

    An older file stays intact until the new one is complete.

    Returns:
        The files written.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("a plot", "bench", "matplotlib")
    import matplotlib

    matplotlib.use("agg")
    style: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.grid": True, "grid.alpha": 0.25, "figure.dpi": 110, "axes.titlesize": 12}
    written = []
    with matplotlib.rc_context(style):
        for run in results.latency:
            if run.towers:
                written.append(_save(_latency(run), directory / f"latency-{slug(run)}.png"))
            if run.stages:
                written.append(_save(_stages(run), directory / f"stages-{slug(run)}.png"))
        if results.load is not None and results.load.points:
            written.append(_save(_load(results.load), directory / "load.png"))
        if results.accuracy is not None:
            written.append(_save(_accuracy(results.accuracy), directory / "accuracy.png"))
    return written


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    with new_file(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    return path


def _style(runner: str) -> dict[str, Any]:
    spec = RunnerSpec.parse(runner)
    family = max((f for f in _COLORS if spec.runtime.startswith(f)), key=len, default="eager")
    dash = _DASHES[multiplied_in(spec)]
    return {"color": _COLORS[family], "linestyle": dash, "marker": "o", "markersize": 4}


def _latency(run: LatencyRun) -> Any:
    """Draw a panel for images and one for each text length: milliseconds against batch."""
    from matplotlib import pyplot

    batches: dict[tuple[str, int | None], list[int]] = {}
    for work in works(run):
        batches.setdefault((work[0], work[2]), []).append(work[1])
    kinds = [kind for kind, found in batches.items() if len(found) > 1] or list(batches)
    columns = min(_COLUMNS, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    size = 6.6 * columns, 5.2 * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    for axis, (tower, length) in zip(axes.flat, kinds, strict=False):
        lines: dict[str, list[TowerLatency]] = {}
        for one in run.towers:
            if (one.tower, one.length) == (tower, length):
                lines.setdefault(one.runner, []).append(one)
        ends = []
        for runner, points in lines.items():
            points.sort(key=lambda point: point.batch)
            times = [point.timing.milliseconds for point in points]
            axis.plot([point.batch for point in points], times, label=runner, **_style(runner))
            ends.append((times[-1], f"{runner}  {points[-1].ratio:.1f}x", _style(runner)["color"]))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        _label_ends(axis, max(axis.get_xlim()), ends)
        ticks = sorted({one.batch for points in lines.values() for one in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("batch")
        axis.set_ylabel("ms per batch")
        axis.set_title("Images" if tower == "image" else f"Texts of {length} tokens")
    figure.suptitle(
        f"{run.model.name} on {_device(run)}\n"
        f"ratio to {run.reference} at the largest batch; lower is faster",
        y=1.02,
    )
    figure.tight_layout()
    return figure


def _device(run: LatencyRun) -> str:
    gpu = run.environment.gpu
    return gpu.name if run.device == "cuda" and gpu else run.environment.machine


def _label_ends(axis: Any, x: float, ends: list[tuple[float, str, str]]) -> None:
    """Write names next to the ends of lines, without overlap, on a logarithmic axis."""
    ends.sort()
    low, high = axis.get_ylim()
    step = (high / low) ** _LINE
    places = [value for value, _, _ in ends]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] * step)
    places[-1] = min(places[-1], high)
    for index in range(len(places) - 2, -1, -1):
        places[index] = min(places[index], places[index + 1] / step)
    for at, (value, text, color) in zip(places, ends, strict=True):
        axis.annotate(
            text,
            (x, value),
            xytext=(x * 1.12, at),
            color=color,
            fontsize=9.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5},
        )


def _stages(run: LatencyRun) -> Any:
    """Draw the stages as stacked bars, and the latency of the whole pipeline as a line."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    found = {one.stage: one for one in run.stages}
    per = {name: one.timing.milliseconds / one.items for name, one in found.items()}
    panels: dict[str, tuple[str, dict[str, tuple[tuple[str, ...], str]]]] = {
        "image": (
            "One image: JPEG 640x480 to embedding",
            {
                f"this project\n{found['image: tower'].runner}": (
                    ("image: decode", "image: resize", "image: tower"),
                    "image: together",
                ),
                "transformers\nCLIPModel, fp32": (
                    ("image: decode", "image: transformers processor", "image: transformers tower"),
                    "image: transformers together",
                ),
            },
        ),
        "text": (
            "One caption to embedding",
            {
                f"this project\n{found['text: tower'].runner}": (
                    ("text: tokenize", "text: tower"),
                    "text: together",
                ),
                "transformers\npadded to 77": (
                    ("text: transformers tokenizer", "text: transformers tower"),
                    "text: transformers together",
                ),
            },
        ),
    }
    shades = {"decode": "#c6dbef", "resize": "#6baed6", "processor": "#6baed6"}
    shades |= {"tokenize": "#c6dbef", "tokenizer": "#c6dbef", "tower": "#d9641c"}
    figure, axes = pyplot.subplots(2, 1, figsize=(9.5, 4.6))
    for axis, (title, ways) in zip(axes, panels.values(), strict=True):
        for row, (parts, whole) in enumerate(ways.values()):
            left = 0.0
            for part in parts:
                kind = part.split()[-1]
                axis.barh(row, per[part], left=left, color=shades[kind], height=0.55)
                if per[part] > 0.09 * max(per[w] for _, w in ways.values()):
                    label = f"{kind} {per[part]:.2g}"
                    axis.text(
                        left + per[part] / 2, row, label, ha="center", va="center", fontsize=9
                    )
                left += per[part]
            axis.plot([per[whole]] * 2, [row - 0.36, row + 0.36], color="black", linewidth=2)
            axis.text(
                max(per[whole], left),
                row,
                f"  together {per[whole]:.3g} ms",
                va="center",
                fontsize=9.5,
            )
        axis.set_yticks(range(len(ways)), list(ways))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_title(title, loc="left")
        kinds = {part.split()[-1]: None for parts, _ in ways.values() for part in parts}
        handles = [Patch(color=shades[kind], label=kind) for kind in kinds]
        axis.legend(handles=handles, fontsize=8, ncols=len(handles), loc="upper right")
        axis.margins(x=0.22)
        axis.set_xlim(left=0)
    axes[-1].set_xlabel("ms per item; black line: the whole pipeline")
    figure.tight_layout()
    return figure


def _load(run: LoadRun) -> Any:
    """Draw throughput and p99 against concurrency, one column per model."""
    from matplotlib import pyplot

    points = [p for p in run.points if p.mode == "concurrency"]
    models = list(dict.fromkeys(point.model for point in points))
    figure, axes = pyplot.subplots(
        2, len(models), figsize=(5.6 * len(models), 6.4), squeeze=False, sharex="col"
    )
    colors = {"grpc": "#1f6fb4", "http": "#d9641c"}
    for column, model in enumerate(models):
        for client, marker in (("perf_analyzer", "o"), ("asyncio", "x")):
            for protocol, color in colors.items():
                mine = [
                    p
                    for p in points
                    if (p.model, p.client, p.protocol) == (model, client, protocol)
                ]
                mine.sort(key=lambda point: point.load)
                for row, values in enumerate(
                    ([p.throughput_per_s for p in mine], [p.p99_ms for p in mine])
                ):
                    axes[row][column].plot(
                        [p.load for p in mine],
                        values,
                        color=color,
                        marker=marker,
                        linestyle="-" if client == "perf_analyzer" else "none",
                        markersize=5 if client == "perf_analyzer" else 8,
                        label=f"{protocol}, {client}" if mine else None,
                    )
        for one in run.saturation:
            if one.model == model:
                axes[0][column].axvline(
                    one.concurrency, color=colors[one.protocol], alpha=0.35, linestyle=":"
                )
        axes[0][column].set_title(f"{model}, one item per request")
        for axis in axes[:, column]:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axes[1][column].set_xscale("log", base=2)
        ticks = sorted({p.load for p in points if p.model == model})
        axes[1][column].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[1][column].set_xlabel("requests in flight; dotted: saturation")
        axes[0][column].set_ylabel("items/s")
        axes[1][column].set_ylabel("p99, ms")
        axes[0][column].legend(fontsize=9, loc="lower right")
    figure.suptitle(f"{run.bundle} served by {run.server}; clients on the same machine")
    figure.tight_layout()
    return figure


def _accuracy(run: AccuracyRun) -> Any:
    """Draw top-1 accuracy with its interval against latency per image, and the Pareto front."""
    from matplotlib import pyplot

    rows = sorted(run.rows, key=lambda row: (row.image_ms, -row.top1))
    slowest = rows[-1].image_ms
    wide = (
        slowest / rows[0].image_ms
    ) ** 0.17  # width of a name, as a factor on the logarithmic axis
    figure, axis = pyplot.subplots(figsize=(8.6, 5.0))
    lift, before = 0, 0.0
    front: list[tuple[float, float]] = []
    for row in rows:
        milliseconds, top1 = row.image_ms, 100 * row.top1
        style = _style(row.runner) | {"linestyle": "none", "markersize": 7}
        around = [[top1 - 100 * row.top1_low], [100 * row.top1_high - top1]]
        axis.errorbar(milliseconds, top1, yerr=around, elinewidth=1, capsize=3, **style)
        lift = lift + 1 if milliseconds < wide * before else 0  # names would overlap
        before = milliseconds
        last = milliseconds > slowest / wide
        axis.annotate(
            row.runner,
            (milliseconds, top1),
            xytext=(-7 if last else 7, 6 + 14 * lift),
            textcoords="offset points",
            ha="right" if last else "left",
            fontsize=9,
            color=style["color"],
        )
        if not front or top1 > front[-1][1]:
            front.append((milliseconds, top1))
    front.append((slowest, front[-1][1]))
    axis.step(*zip(*front, strict=True), where="post", color="#3a8f3a", alpha=0.4, lw=4, zorder=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:.2g}")
    axis.set_xlabel(f"ms per image, batches of {run.image_batch}")
    axis.set_ylabel("zero-shot top-1, %")
    axis.set_title(
        f"{run.bundle}: {run.images} images, {run.labels} labels; bars: 95 %, green: Pareto front",
        fontsize=11,
    )
    figure.tight_layout()
    return figure
