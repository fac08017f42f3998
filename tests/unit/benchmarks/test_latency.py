"""`python -m benchmarks latency`, `report` and `compare`, on a tiny model, by real runs."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image

from benchmarks.latency.candidates import FULL, SHORT, Turns, Work, batch_of, wanted
from benchmarks.latency.test_stages import caption
from benchmarks.report.compare import compare
from benchmarks.report.markdown import (
    BEGIN,
    END,
    Results,
    headlines,
    markdown,
    readme_part,
    write_report,
)
from benchmarks.report.results import Latency, Timed
from serving.errors import InputError
from serving.inputs.tokenizer import Tokenizer
from tests.support.paths import CHECKOUT

RUNNERS = ("eager:fp32", "onnxruntime:fp32", "transformers*", "onnxruntime-plain:fp32")


def run(*arguments, module="benchmarks", **variables):
    # pytest-benchmark measures nothing below pytest-xdist.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = outside | {"PYTEST_PLUGINS": "tests.support.benchmark_plugin"} | variables
    environment["PYTHONPATH"] = str(CHECKOUT)
    # On a loaded machine, threads of PyTorch that spin made 3 ms of eager float32 600.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


@pytest.fixture(scope="module")
def folder(tiny_bundle, tmp_path_factory) -> Path:
    """A folder with a `latency.json` of everything, of a few runners."""
    path = tmp_path_factory.mktemp("results")
    runners = [f"--runner={pattern}" for pattern in RUNNERS]
    done = run(
        *("latency", tiny_bundle.path, "--budget", "0.05", "--output", path / "latency.json"),
        *runners,
    )
    assert done.returncode == 0, done.stderr
    assert "x eager fp32" in done.stdout
    return path


def by_turns(reference, seconds):
    """The ratio of two lists of runs, of which the first is by turns."""
    runs = len(seconds) // len(reference)
    ours = [median(seconds[place : place + runs]) for place in range(0, len(seconds), runs)]
    return median(median(theirs) / mine for theirs, mine in zip(reference, ours, strict=True))


def test_every_runner_is_timed_in_turns_with_eager(folder):
    latency = Latency(folder / "latency.json")
    assert latency.works() == sorted(
        {(w.tower, w.batch, w.length) for w in SHORT}, key=lambda w: (w[0], w[2] or 0, w[1])
    )
    for tower, batch, length in latency.works():
        found = {one.facts["runner"]: one for one in latency.of(tower, batch, length)}
        expected = {"eager:fp32", "onnxruntime:fp32", "transformers:fp32", "onnxruntime-plain:fp32"}
        assert set(found) == expected | ({"transformers-longest:fp32"} if length else set())
        for one in found.values():
            assert len(one.reference_seconds) >= 5
            assert len(one.seconds) % len(one.reference_seconds) == 0
            assert min(map(min, one.reference_seconds)) > 0
            assert one.facts["cosine"] > 0.9999  # all of them compute the same thing
            assert one.ratio == pytest.approx(by_turns(one.reference_seconds, one.seconds))
            padded = one.facts["runner"] not in ("onnxruntime:fp32", "transformers-longest:fp32")
            assert one.facts["length_run"] == (77 if length and padded else length)


def test_the_record_tells_the_machine_and_the_model(folder, tiny_bundle):
    document = json.loads((folder / "latency.json").read_text())
    where = document["machine_info"]["environment"]
    assert where["cpu"]["usable"] >= 1
    assert {"fpu", "sse2"} <= set(where["cpu"]["flags"]) or where["cpu"]["flags"]
    assert where["libraries"]["torch"]
    assert where["commit"] is None or re.match("[0-9a-f]{40}", where["commit"])
    assert document["bundle"]["weights_sha256"] == tiny_bundle.manifest.provenance.weights_sha256
    for key in ("limits", "limits_at_end"):
        limits = document[key]["cpu"]
        assert set(limits["matmul_tflops"]) | set(limits["without"]) >= {"fp32", "bf16", "int8"}
        assert limits["copy_gb_per_s"] > 0


def test_stages_and_footprints_are_told(folder):
    latency = Latency(folder / "latency.json")
    stages = {one.facts["stage"]: one for one in latency.stages}
    assert {"image: decode", "image: together", "text: transformers longest"} <= set(stages)
    found = {one.facts["runner"]: one.facts for one in latency.footprints}
    assert set(found) == {"eager:fp32", "onnxruntime:fp32", "transformers:fp32"}
    for facts in found.values():
        assert 0 < facts["before_bytes"] < facts["loaded_bytes"] <= facts["peak_bytes"]
        assert facts["load_s"] > 0
    # PyTorch alone is larger than this model and ONNX Runtime.
    assert found["eager:fp32"]["peak_bytes"] > found["onnxruntime:fp32"]["peak_bytes"]


def test_a_report_is_made_of_entries(folder, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{BEGIN}\nold\n{END}\ntail\n")
    written = write_report(folder, tmp_path / "new" / "RESULTS.md", readme)
    assert {path.name for path in written} >= {"RESULTS.md", "latency.png", "stages.png"}
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 300
    text = (tmp_path / "new" / "RESULTS.md").read_text()
    entries = {
        b["name"]: b for b in json.loads((folder / "latency.json").read_text())["benchmarks"]
    }
    rows = re.findall(r"^\| .* \| ([\d.]+)x \| `latency.json: (.*)` \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for ratio, name in rows:
        entry = entries[name]
        expected = by_turns(entry["extra_info"]["reference_seconds"], entry["stats"]["data"])
        assert float(ratio) == pytest.approx(expected, abs=0.051)
    part = readme.read_text()
    assert part.startswith("# Title\n")
    assert part.endswith(f"{END}\ntail\n")
    assert "old" not in part
    assert [f"{float(ratio)}x" in part for ratio, _ in rows] == [True] * 4
    assert "The reference measured against itself" in text


@pytest.mark.parametrize(("slower", "warned"), [(1.4, False), (1.6, True)])
def test_a_machine_that_was_not_quiet_is_told(folder, tmp_path, slower, warned):
    """One row's reference took so many times as long as the others' of the same work."""
    document = json.loads((folder / "latency.json").read_text())
    for entry in document["benchmarks"]:
        facts = entry["extra_info"]
        if facts.get("kind") == "tower":
            this = (facts["runner"], facts["tower"]) == ("onnxruntime:fp32", "image")
            turns = len(facts["reference_seconds"])
            facts["reference_seconds"] = [[slower if this else 1.0]] * turns
    (tmp_path / "latency.json").write_text(json.dumps(document))
    results = Results.of(tmp_path)
    told = f"by eager fp32 moved by {slower:.2f}x over the run; measure again"
    for text in (markdown(results, "."), readme_part(results, ".", "RESULTS.md")):
        assert (told in text) == warned
    assert any(told in warning for warning in compare(tmp_path, tmp_path).warnings) == warned


def test_a_readme_without_a_place_is_left_alone(folder, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(InputError, match="lacks the lines"):
        write_report(folder, tmp_path / "RESULTS.md", readme)
    assert readme.read_text() == "# Title\n"


def test_a_folder_without_results_is_told_so(tmp_path):
    done = run("report", tmp_path)
    assert done.returncode == 2
    assert "holds no results; expected latency.json" in done.stderr


def test_the_committed_readme_tells_the_committed_results():
    readme = (CHECKOUT / "README.md").read_text()
    part = readme.partition(BEGIN)[2].partition(END)[0]
    folder = CHECKOUT / re.search(r"\((benchmarks/results/[^/)]+)/latency.png\)", part)[1]
    for line in headlines(Results.of(folder)):
        assert f"| {line.what} | {line.before} | {line.after} | {line.ratio:.1f}x |" in part


@pytest.fixture(scope="module")
def slower(tiny_bundle, folder) -> Path:
    """One runner's towers alone, which take thirty times as long."""
    path = folder / "slower.json"
    done = run(
        *(
            CHECKOUT / "benchmarks" / "latency" / "test_latency.py",
            "--benchmark-enable",
            "--benchmark-json",
        ),
        *(path, "--bundle", tiny_bundle.path, "--budget=0.05", "--runners=onnxruntime:fp32"),
        module="pytest",
        SLOWER="29",
    )
    assert done.returncode == 0, done.stdout
    return path


def test_a_slower_runner_is_caught(folder, slower):
    done = run("compare", folder / "latency.json", slower, "--threshold", "0.5", "--json")
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    verdicts = {c["name"]: c["verdict"] for c in document["changes"]}
    towers = {name: v for name, v in verdicts.items() if "onnxruntime:fp32" in name}
    assert len(towers) == len(SHORT)
    assert list(towers.values()).count("slower") >= len(SHORT) - 2  # rounds are few and short
    assert any("transformers" in name for name in document["only_old"])


def test_results_are_as_fast_as_themselves(folder):
    done = run("compare", folder, folder)
    assert done.returncode == 0
    assert "0 of" in done.stdout


def altered(folder, target, factor, spread=0.0):
    """`folder`'s results with onnxruntime:fp32 slower by `factor`, in turns that differ."""
    document = json.loads((folder / "latency.json").read_text())
    rng = np.random.default_rng(0)
    for entry in document["benchmarks"]:
        if (
            entry["extra_info"].get("runner") == "onnxruntime:fp32"
            and "tower" in entry["extra_info"]
        ):
            turns = len(entry["extra_info"]["reference_seconds"])
            entry["extra_info"]["reference_seconds"] = [[1.0]] * turns
            noise = 1 + spread * rng.standard_normal(turns)
            entry["stats"]["data"] = (factor * np.abs(noise)).tolist()
    target.write_text(json.dumps(document))
    return target


@pytest.mark.parametrize(
    ("factor", "spread", "verdict"),
    [(1.05, 0.001, "same"), (1.3, 0.01, "slower"), (0.7, 0.01, "faster"), (1.3, 1.0, "same")],
)
def test_a_change_counts_beyond_threshold_and_noise(folder, tmp_path, factor, spread, verdict):
    old = altered(folder, tmp_path / "old.json", 1.0, spread)
    new = altered(folder, tmp_path / "new.json", factor, spread)
    name = "test_latency[image-onnxruntime:fp32-image 4]"
    found = next(c for c in compare(old, new).changes if c.name == name)
    assert found.verdict == verdict
    if spread < 1:
        assert found.change == pytest.approx(1 / factor, rel=0.05)


def test_results_of_something_else_are_refused(folder, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    done = run("compare", folder, other)
    assert done.returncode == 2
    assert "is not of this suite" in done.stderr
    done = run("compare", folder, tmp_path / "absent.json")
    assert done.returncode == 2
    assert "cannot be read as results" in done.stderr


def test_a_failed_run_leaves_the_old_results(tiny_bundle, tmp_path):
    output = tmp_path / "latency.json"
    output.write_text("old")
    done = run("latency", tmp_path / "nothing", "--output", output)
    assert done.returncode == 2
    assert "is not a bundle" in done.stderr
    assert output.read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_short_and_padded_texts_are_the_same_texts(tiny_bundle):
    work = Work(tower="text", batch=4, length=9)
    cut, full = batch_of(tiny_bundle, work), batch_of(tiny_bundle, work, padded=True)
    assert cut.shape == (4, 9)
    assert full.shape == (4, 77)
    assert np.array_equal(cut, full[:, :9])
    assert (full[:, 9:] == tiny_bundle.manifest.text.pad_id).all()
    assert (cut[:, -1] == tiny_bundle.manifest.text.end_id).all()


@pytest.mark.parametrize(("context_length", "longest"), [(8, 7), (32, 10), (77, 10)])
def test_captions_are_cut_for_the_model(tiny_bundle, context_length, longest):
    spec = replace(tiny_bundle.manifest.text, context_length=context_length)
    tokenizer = Tokenizer(tiny_bundle.tokenizer, spec)
    captions = [caption(tokenizer, context_length, number) for number in range(8)]
    assert max(map(len, tokenizer.encode(captions))) == longest


def test_turns_alternate():
    told = []
    turns = Turns(lambda: told.append("reference"), lambda: told.append("mine"))
    assert turns.rounds(1e-9) == 5 * 16  # half of 31 runs are timed
    turns._both = 2.0
    assert turns.rounds(1e-9) == 3 * 16
    assert turns.rounds(20.0) == 10 * 16
    turns._both = 1e-6
    assert turns.rounds(1e9) == 15 * 16
    told.clear()
    for _ in range(17):
        turns.setup()
        told.append("timed")
    turn = ["reference"] * 31 + ["mine"] * 15 + ["timed"] * 16
    assert told == (turn * 2)[: 31 + 15 + 16 + 31 + 15 + 1]
    assert list(map(len, turns.reference_seconds)) == [16, 16]


def test_slow_runs_need_no_untimed_ones():
    told = []
    slow = partial(time.sleep, 0.2)
    turns = Turns(lambda: (told.append("reference"), slow()), lambda: (told.append("mine"), slow()))
    assert turns.rounds(1e-9) == 5
    told.clear()
    turns.setup()
    turns.setup()
    assert told == ["reference"] * 2


def test_a_ratio_is_of_adjacent_turns():
    """The machine is half as fast in the second turn; one run of the third was interrupted."""
    one = Timed(
        name="",
        seconds=(1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 9.0, 1.0),
        reference_seconds=((3.0, 3.0), (6.0, 6.0), (3.0, 3.0)),
        facts={},
    )
    assert one.ratio == 3
    assert set(one.ratios(np.random.default_rng(0))) == {3.0}
    assert (one.milliseconds, one.reference_milliseconds) == (1000, 3000)


def test_the_matrices():
    assert set(SHORT) <= set(FULL)
    assert {w.batch for w in FULL if w.tower == "image"} == {1, 2, 4, 8, 16, 32, 64}
    assert not wanted("openvino:fp16", full=False, patterns=())
    assert wanted("openvino:fp16", full=True, patterns=())
    assert wanted("openvino:fp16", full=False, patterns=("openvino:*",))
    assert not wanted("eager:fp32", full=True, patterns=("openvino:*",))
