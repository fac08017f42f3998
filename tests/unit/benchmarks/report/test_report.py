"""`python -m benchmarks report`: `RESULTS.md`, plots, and the table of the README."""

import re
from dataclasses import replace
from statistics import median

import pytest
from PIL import Image
from rich.console import Console

from benchmarks.report.compare import compare
from benchmarks.report.markdown import (
    BEGIN,
    END,
    headlines,
    markdown,
    readme_part,
    write_report,
)
from benchmarks.report.tables import latency_table
from serving.errors import InputError
from serving.util.results import Results
from tests.support.paths import CHECKOUT


@pytest.fixture
def directory(measured, tmp_path):
    """A copy of the measured results, to write a report into."""
    Results.read(measured).write(tmp_path / "results.json")
    return tmp_path


def test_report_writes_results_plots_and_readme(directory):
    readme = directory / "README.md"
    readme.write_text(f"# Title\n{BEGIN}\nold\n{END}\ntail\n")
    written = write_report(directory, readme)
    names = {"RESULTS.md", "latency-tiny-clip.png", "stages-tiny-clip.png", "README.md"}
    assert {path.name for path in written} == names
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 300
    text = (directory / "RESULTS.md").read_text()
    (run,) = Results.read(directory).latency
    entries = {one.name: one for one in (*run.towers, *run.stages)}
    rows = re.findall(r"^\| .* \| ([\d.]+)x \| `latency: (.*)` \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for ratio, name in rows:
        assert float(ratio) == pytest.approx(median(entries[name].ratios), abs=0.051)
    part = readme.read_text()
    assert part.startswith("# Title\n")
    assert part.endswith(f"{END}\ntail\n")
    assert "old" not in part
    assert [f"{float(ratio)}x" in part for ratio, _ in rows] == [True] * 4
    assert "The reference measured against itself" in text


@pytest.mark.parametrize(("slower", "warned"), [(1.4, False), (1.6, True)])
def test_busy_machine_is_reported(directory, slower, warned):
    """The reference of one row took `slower` times as long as in other rows of the same work."""
    results = Results.read(directory)
    (run,) = results.latency
    towers = tuple(
        replace(
            one,
            reference_ms=slower
            if (one.runner, one.tower) == ("onnxruntime:fp32", "image")
            else 1.0,
        )
        for one in run.towers
    )
    results = replace(results, latency=(replace(run, towers=towers),))
    results.write(directory)
    warning = f"by eager:fp32 varied by {slower:.2f}x over the run; measure again"
    for text in (markdown(results), readme_part(results, ".")):
        assert (warning in text) == warned
    assert any(warning in one for one in compare(directory, directory).warnings) == warned


def test_readme_without_markers_is_unchanged(directory):
    readme = directory / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(InputError, match="lacks the lines"):
        write_report(directory, readme)
    assert readme.read_text() == "# Title\n"


def test_a_directory_without_results_is_an_error(run_benchmarks, tmp_path):
    done = run_benchmarks("report", tmp_path)
    assert done.returncode == 2
    assert "results.json cannot be read as benchmark results" in done.stderr


def test_the_committed_readme_shows_the_committed_results():
    readme = (CHECKOUT / "README.md").read_text()
    part = readme.partition(BEGIN)[2].partition(END)[0]
    folder = CHECKOUT / re.search(r"\((benchmarks/results/[^/)]+)/RESULTS.md\)", part)[1]
    for line in headlines(Results.read(folder)):
        assert f"| {line.what} | {line.before} | {line.after} | {line.ratio:.1f}x |" in part


@pytest.mark.parametrize(
    "folder", sorted((CHECKOUT / "benchmarks" / "results").iterdir()), ids=lambda path: path.name
)
def test_committed_reports_equal_their_results(folder):
    """Every committed machine also has the same layout of files."""
    results = Results.read(folder)
    assert (folder / "RESULTS.md").read_text() == markdown(results)
    plots = re.findall(r"\]\(\./([\w.-]+\.png)\)", markdown(results))
    assert {path.name for path in folder.iterdir()} == {"results.json", "RESULTS.md", *plots}


def test_a_gpu_run_has_both_times(directory):
    """The results are made from a CPU run, since this machine may have no GPU."""
    (run,) = Results.read(directory).latency
    towers = tuple(
        replace(
            one,
            runner=one.runner.replace("eager:", "eager-cuda:"),
            device_timing=replace(one.timing, milliseconds=0.125)
            if one.runner == "eager:fp32"
            else None,
        )
        for one in run.towers
    )
    run = replace(run, device="cuda", reference="eager-cuda:fp32", towers=towers)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(latency_table(run))
    shown = console.export_text()
    assert "ms device" in shown
    assert shown.count("0.12") >= 4
    assert "| ms on the device |" in markdown(Results(latency=(run,)))
    Results(latency=(run,)).write(directory)
    assert (directory / "latency-tiny-clip-cuda.png") in write_report(directory)
