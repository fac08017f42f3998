"""`RESULTS.md` for a directory of results, and the benchmark section of the README.

Every number is computed from `results.json`. Headlines name the entries that they come from.
`plots.py` draws the plots.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report.analysis import disturbed, of
from benchmarks.report.plots import draw
from benchmarks.report.sections import (
    accuracy_section,
    latency_section,
    load_section,
    machine_section,
    slug,
    table,
)
from serving.errors import InputError
from serving.util.files import check_file, write_text
from serving.util.results import InTurns, LatencyRun, Results

BEGIN, END = "<!-- benchmarks: begin, written by `python -m benchmarks report` -->", "<!-- end -->"
_PEERS = ("eager", "torchscript", "compiled", "transformers", "onnxruntime-plain")


@dataclass(frozen=True, slots=True)
class Headline:
    """Row of the README's table."""

    what: str
    before: str
    after: str
    ratio: float
    source: str
    """Entries that it is computed from."""


def write_report(directory: Path, readme: Path | None = None) -> list[Path]:
    """Write `RESULTS.md` and the plots of a directory of results, and the marked part of `readme`.

    Returns:
        The files written.

    Raises:
        InputError: there are no results, or `readme` lacks the markers.
        MissingPackageError: matplotlib is not installed.
    """
    results, target = Results.read(directory), directory / "RESULTS.md"
    check_file(target)
    if readme is not None:
        check_file(readme)
    plots = draw(results, directory)
    write_text(target, markdown(results))
    written = [*plots, target]
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text.partition(BEGIN)[2]:
            raise InputError(
                f"{readme} lacks the lines {BEGIN!r} and {END!r}", advice="add them to the file"
            )
        head, _, rest = text.partition(BEGIN)
        part = readme_part(results, Path(os.path.relpath(directory, readme.parent)).as_posix())
        write_text(readme, f"{head}{BEGIN}\n{part}{END}{rest.partition(END)[2]}")
        written.append(readme)
    return written


def markdown(results: Results) -> str:
    """Return the whole report."""
    parts = ["# Results\n", "Written by `python -m benchmarks report`; do not edit.\n"]
    runs = (*results.latency, results.load, results.accuracy)
    environments = [run.environment for run in runs if run is not None]
    parts += machine_section(environments[0]) if environments else []
    rows = list(headlines(results))
    if rows:
        parts += ["## In short\n", _headline_table(rows, sources=True), *_warnings(results)]
    for run in results.latency:
        parts += latency_section(run, ".")
    if results.load is not None:
        parts += load_section(results.load, ".")
    if results.accuracy is not None:
        parts += accuracy_section(results.accuracy, ".")
    return "\n".join(parts)


def readme_part(results: Results, directory: str) -> str:
    """Return the headlines, the date, the machine and a plot.

    Args:
        results: the results.
        directory: directory of the results, relative to the README.

    Raises:
        InputError: there is no latency run.
    """
    run = _first(results)
    if run is None:
        raise InputError(
            "the README section requires a latency run", advice="run `python -m benchmarks latency`"
        )
    report = f"{directory}/RESULTS.md"
    lines = [
        _headline_table(list(headlines(results)), sources=False),
        *_warnings(results),
        f"{run.model.name} on {run.environment.machine}, {run.environment.date[:10]}; medians; "
        "`faster` is the median of the ratios of adjacent turns. All runners, limits of the "
        f"machine, stages, load and accuracy: [{report}]({report}).\n",
        f"![latency against batch]({directory}/latency-{slug(run)}.png)\n",
    ]
    return "\n".join(lines)


def headlines(results: Results) -> Iterator[Headline]:
    """Yield at most five comparisons with PyTorch."""
    run = _first(results)
    if run is not None:
        for what, work in (
            ("an image", ("image", 1, None)),
            ("4 images", ("image", 4, None)),
            ("8 texts of 16 tokens, which PyTorch gets padded to 77", ("text", 8, 16)),
        ):
            ours = [one for one in of(run, work) if not one.runner.startswith(_PEERS)]  # type: ignore[arg-type]
            if ours:
                one = ours[0]
                before = f"{one.reference_ms:.1f} ms, {run.reference}"
                yield _headline(f"tower: {what}", before, one, one.runner, one.name)
        for stage in run.stages:
            if stage.stage == "image: together":
                what = f"{stage.items} JPEGs of 640x480 to embeddings, in process"
                before = f"{stage.reference_ms:.1f} ms, transformers"
                yield _headline(what, before, stage, stage.runner, stage.name)
    against = results.load.against_eager if results.load is not None else None
    if against is not None:
        yield Headline(
            "JPEGs of 640x480 to embeddings, served by Triton over gRPC",
            f"{against.eager_per_s:.1f} /s, eager fp32 loop",
            f"{against.served_per_s:.1f} /s, {against.runner}",
            against.speedup,
            "load: against_eager",
        )


def _headline(what: str, before: str, one: InTurns, runner: str, name: str) -> Headline:
    after = f"{one.timing.milliseconds:.1f} ms, {runner}"
    return Headline(what, before, after, one.ratio, f"latency: {name}")


def _first(results: Results) -> LatencyRun | None:
    """Return the run for the headlines: the first one of the short matrix, else the first one."""
    short = [run for run in results.latency if run.matrix == "short"]
    return next(iter((*short, *results.latency)), None)


def _warnings(results: Results) -> Iterator[str]:
    for run in results.latency:
        if warning := disturbed(run):
            yield f"**Warning for {run.model.name}:** {warning}.\n"


def _headline_table(rows: Sequence[Headline], *, sources: bool) -> str:
    columns = ["", "PyTorch", "this project", "faster"] + (["from"] if sources else [])
    cells = [
        [r.what, r.before, r.after, f"{r.ratio:.1f}x"] + ([f"`{r.source}`"] if sources else [])
        for r in rows
    ]
    return table(columns, cells)
