"""`python -m benchmarks compare`: changes beyond the threshold and the noise are reported."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.latency.candidates import WORKS
from benchmarks.report.compare import compare
from serving.util.results import Results

SHORT = WORKS["cpu", "short"]


@pytest.fixture(scope="module")
def slower(run_benchmarks, tiny_bundle, tmp_path_factory):
    """Results of the towers of one runner only, slowed down thirty times."""
    path = tmp_path_factory.mktemp("slower")
    options = ("--budget=0.05", "--runner=onnxruntime:fp32", "--output", path)
    done = run_benchmarks("latency", tiny_bundle.path, *options, SLOWER="29")
    assert done.returncode == 0, done.stdout
    return path


def test_slower_runner_is_reported(run_benchmarks, measured, slower):
    done = run_benchmarks("compare", measured, slower, "--threshold", "0.5", "--json")
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    verdicts = {c["name"]: c["verdict"] for c in document["changes"]}
    towers = {name: v for name, v in verdicts.items() if "onnxruntime:fp32" in name}
    assert len(towers) == len(SHORT)
    assert list(towers.values()).count("slower") >= len(SHORT) - 2  # the rounds are few and short
    assert any("transformers" in name for name in document["only_old"])


def test_results_equal_themselves(run_benchmarks, measured):
    done = run_benchmarks("compare", measured, measured)
    assert done.returncode == 0
    assert "0 of" in done.stdout


def altered(directory, target, factor, spread=0.0):
    """The results with onnxruntime:fp32 slowed down by `factor`, with varying rounds."""
    results = Results.read(directory)
    (run,) = results.latency
    rng = np.random.default_rng(0)
    towers = []
    for one in run.towers:
        if one.runner == "onnxruntime:fp32":
            noise = np.abs(1 + spread * rng.standard_normal(len(one.ratios)))
            towers.append(replace(one, ratios=tuple((1 / factor / noise).tolist())))
        else:
            towers.append(one)
    replace(results, latency=(replace(run, towers=tuple(towers)),)).write(target)
    return target


@pytest.mark.parametrize(
    ("factor", "spread", "verdict"),
    [(1.05, 0.001, "same"), (1.3, 0.01, "slower"), (0.7, 0.01, "faster"), (1.3, 1.0, "same")],
)
def test_a_change_counts_beyond_threshold_and_noise(measured, tmp_path, factor, spread, verdict):
    old = altered(measured, tmp_path / "old.json", 1.0, spread)
    new = altered(measured, tmp_path / "new.json", factor, spread)
    name = "tiny-clip: image 4, onnxruntime:fp32"
    found = next(c for c in compare(old, new).changes if c.name == name)
    assert found.verdict == verdict
    if spread < 1:
        assert found.change == pytest.approx(1 / factor, rel=0.05)


def test_other_machine_and_weights_cause_warnings(measured, tmp_path):
    results = Results.read(measured)
    (run,) = results.latency
    run = replace(
        run,
        environment=replace(run.environment, machine="another"),
        model=replace(run.model, weights_sha256="0" * 64),
    )
    replace(results, latency=(run,)).write(tmp_path / "other.json")
    warnings = compare(measured, tmp_path / "other.json").warnings
    assert any("different machines" in warning for warning in warnings)
    assert any("different weights of tiny-clip" in warning for warning in warnings)


def test_invalid_results_are_rejected(run_benchmarks, measured, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    done = run_benchmarks("compare", measured, other)
    assert done.returncode == 2
    assert "expected schema 1, found None" in done.stderr
    done = run_benchmarks("compare", measured, tmp_path / "absent.json")
    assert done.returncode == 2
    assert "cannot be read as benchmark results" in done.stderr
