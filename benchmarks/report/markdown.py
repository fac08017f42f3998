"""Results in words: `RESULTS.md` of a folder of results, and the README's part of it.

Every number is computed here from the JSON files, none is typed in; headlines name the
entries they are of. Plots are drawn by `plots.py`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report.plots import draw
from benchmarks.report.results import Document, Latency, Timed, fastest_first, read
from benchmarks.report.sections import (
    accuracy_section,
    latency_section,
    machine_section,
    noise_section,
    served_section,
    table,
)
from serving.errors import InputError
from serving.util.files import write_text

BEGIN, END = "<!-- benchmarks: begin, written by `python -m benchmarks report` -->", "<!-- end -->"
_PEERS = ("eager", "torchscript", "compiled", "transformers", "onnxruntime-plain")


@dataclass(frozen=True, slots=True)
class Results:
    """What a folder holds; what was not measured is None."""

    latency: Latency | None
    served: Document | None
    accuracy: Document | None

    @classmethod
    def of(cls, folder: Path) -> "Results":
        """Read `latency.json`, `served.json` and `accuracy.json` of `folder`.

        Raises:
            InputError: it holds none of them, or one that cannot be read.
        """
        files = {name: folder / f"{name}.json" for name in ("latency", "served", "accuracy")}
        if not any(file.exists() for file in files.values()):
            raise InputError(
                f"{folder} holds no results; expected {', '.join(f.name for f in files.values())}, "
                "which `make bench` writes"
            )
        served, accuracy = (
            read(files[name]) if files[name].exists() else None for name in ("served", "accuracy")
        )
        latency = Latency(files["latency"]) if files["latency"].exists() else None
        return cls(latency, served, accuracy)

    @property
    def environment(self) -> Document:
        """Of the latencies, or of what there is."""
        if self.latency is not None:
            return self.latency.environment
        found: Document = (self.served or self.accuracy or {})["environment"]
        return found


@dataclass(frozen=True, slots=True)
class Headline:
    """A line of the README's table."""

    what: str
    before: str
    after: str
    ratio: float
    source: str
    """File and entries that it can be computed from."""


def write_report(folder: Path, target: Path, readme: Path | None = None) -> list[Path]:
    """Draw the plots into `folder`, write `target` and the marked part of `readme`.

    Returns:
        All files written.

    Raises:
        InputError: there are no results, or `readme` lacks the markers.
        RunnerError: matplotlib is not installed.
    """
    results = Results.of(folder)
    plots = draw(results.latency, results.served, results.accuracy, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, markdown(results, _relative(folder, target.parent)))
    written = [*plots, target]
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text.partition(BEGIN)[2]:
            raise InputError(f"{readme} lacks the lines {BEGIN!r} and {END!r}; put them in it")
        head, _, rest = text.partition(BEGIN)
        part = readme_part(
            results, _relative(folder, readme.parent), _relative(target, readme.parent)
        )
        write_text(readme, f"{head}{BEGIN}\n{part}{END}{rest.partition(END)[2]}")
        written.append(readme)
    return written


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()


def markdown(results: Results, folder: str) -> str:
    """The whole report; plots are referred to in `folder`."""
    parts = ["# Results\n", "Written by `python -m benchmarks report`; do not edit.\n"]
    parts += machine_section(results.environment)
    rows = list(headlines(results))
    if rows:
        parts += ["## In short\n", _headline_table(rows, sources=True), *_warned(results.latency)]
    if results.latency is not None:
        parts += latency_section(results.latency, folder)
    if results.served is not None:
        parts += served_section(results.served, folder)
    if results.accuracy is not None:
        parts += accuracy_section(results.accuracy, folder)
    if results.latency is not None:
        parts += noise_section(results.latency)
    return "\n".join(parts)


def readme_part(results: Results, folder: str, report: str) -> str:
    """A picture, the headlines, the date and the machine."""
    latency = results.latency
    if latency is None:
        raise InputError("the README's part needs a latency.json")
    lines = [
        _headline_table(list(headlines(results)), sources=False),
        *_warned(latency),
        f"{latency.bundle['name']} on {latency.environment['machine']}, "
        f"{str(latency.environment['date'])[:10]}; medians; `faster` is the median of ratios of "
        "adjacent turns. "
        f"All runners, limits of the machine, stages, load and accuracy: [{report}]({report}).\n",
        f"![latency against batch]({folder}/latency.png)\n",
    ]
    return "\n".join(lines)


def _warned(latency: Latency | None) -> Iterator[str]:
    if latency is not None and (warning := latency.disturbed()):
        yield f"**Careful:** {warning}.\n"


def headlines(results: Results) -> Iterator[Headline]:
    """Ours against PyTorch, five lines."""
    latency = results.latency
    if latency is not None:
        for what, tower, batch, length in (
            ("a picture", "image", 1, None),
            ("4 pictures", "image", 4, None),
            ("8 texts of 16 tokens, which PyTorch gets padded to 77", "text", 8, 16),
        ):
            ours = [
                one
                for one in latency.of(tower, batch, length)
                if not one.facts["runner"].startswith(_PEERS)
            ]
            if ours:
                yield _headline(f"tower: {what}", fastest_first(ours)[0], "eager fp32")
        stages = {one.facts["stage"]: one for one in latency.stages}
        if "image: together" in stages:
            one = stages["image: together"]
            what = f"{one.facts['items']} JPEGs of 640x480 to embeddings, in process"
            yield _headline(what, one, "transformers")
    against = results.served["against_eager"] if results.served is not None else None
    if against is not None:
        yield Headline(
            "JPEGs of 640x480 to embeddings, served by Triton over gRPC",
            f"{against['eager_per_s']:.1f} /s, eager fp32 loop",
            f"{against['served_per_s']:.1f} /s, {against['runner']}",
            against["speedup"],
            "served.json: against_eager",
        )


def _headline(what: str, one: Timed, peer: str) -> Headline:
    return Headline(
        what,
        f"{one.reference_milliseconds:.1f} ms, {peer}",
        f"{one.milliseconds:.1f} ms, {one.facts['runner']}",
        one.ratio,
        f"latency.json: {one.name}",
    )


def _headline_table(rows: Sequence[Headline], *, sources: bool) -> str:
    columns = ["", "PyTorch", "this project", "faster"] + (["from"] if sources else [])
    cells = [
        [r.what, r.before, r.after, f"{r.ratio:.1f}x"] + ([f"`{r.source}`"] if sources else [])
        for r in rows
    ]
    return table(columns, cells)
