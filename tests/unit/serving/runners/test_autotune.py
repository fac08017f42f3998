"""Autotuning: selects the fastest runner that passed the parity gate and runs on this machine."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import pytest

import serving.runners.autotune
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import Artifact
from serving.errors import BundleError, RunnerError
from serving.runners.autotune import BATCH, passed, time_runners
from serving.runners.registry import open_runner
from serving.runners.spec import RUNNERS, RunnerSpec
from serving.util.machine import describe


def with_artifacts(bundle: Bundle, change: Callable[[Artifact], Artifact]) -> Bundle:
    artifacts = tuple(change(artifact) for artifact in bundle.manifest.artifacts)
    return Bundle(bundle.path, replace(bundle.manifest, artifacts=artifacts))


def specs(*names: str) -> list[RunnerSpec]:
    return [RunnerSpec.parse(name) for name in names]


def verdicts(bundle: Bundle, tower: str, *allowed: str) -> Bundle:
    """A copy of `bundle` in which only the runners `allowed` passed for `tower`."""

    def change(artifact: Artifact) -> Artifact:
        if artifact.tower != tower:
            return artifact
        changed = tuple(replace(v, passed=v.runner in allowed) for v in artifact.verdicts)
        return replace(artifact, verdicts=changed)

    return with_artifacts(bundle, change)


class Clock:
    """A clock that only `Slow` runners advance, so that other load does not affect a test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow:
    """A runner whose runs take given times, which may differ between runs."""

    def __init__(self, runner, milliseconds: Iterator[float], clock: Clock) -> None:
        self.runner, self.waits, self.clock = runner, milliseconds, clock

    def __enter__(self):
        self.runner.__enter__()
        return self

    def __exit__(self, *reason):
        return self.runner.__exit__(*reason)

    def run(self, batch):
        self.clock.now += next(self.waits) / 1e3
        return self.runner.run(batch)


def slow_down(monkeypatch, waits: dict[str, Iterator[float]]) -> None:
    clock = Clock()
    monkeypatch.setattr(serving.runners.autotune, "time", clock)

    def opened(bundle, tower, spec):
        runner = open_runner(bundle, tower, spec)
        return Slow(runner, waits[str(spec)], clock) if str(spec) in waits else runner

    monkeypatch.setattr(serving.runners.autotune, "open_runner", opened)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_passed_runners_are_those_with_verdicts(tiny_bundle, tower):
    """The bundle has no int8-dynamic graph, so that runner has no verdict."""
    judged = {
        v.runner for a in tiny_bundle.manifest.artifacts if a.tower == tower for v in a.verdicts
    }
    assert {"onnxruntime:fp32", "onnxruntime:int8", "openvino:int8"} <= judged
    found = passed(tiny_bundle, tower)
    assert set(map(str, found)) == judged
    assert found == [spec for spec in RUNNERS if str(spec) in judged]
    assert RunnerSpec("onnxruntime", "int8-dynamic") not in found


def test_failed_runners_are_excluded(tiny_bundle):
    bundle = verdicts(tiny_bundle, "image", "onnxruntime:fp16", "openvino:fp32")
    assert passed(bundle, "image") == specs("onnxruntime:fp16", "openvino:fp32")
    assert passed(bundle, "text") == passed(tiny_bundle, "text")
    none = with_artifacts(tiny_bundle, lambda a: replace(a, verdicts=()))
    assert passed(none, "image") == passed(none, "text") == []


def test_torchscript_verdict_does_not_count_for_a_graph(tiny_bundle):
    bundle = with_artifacts(tiny_bundle, lambda a: replace(a, kind="torchscript"))
    assert passed(bundle, "image") == []


def test_runners_missing_in_this_environment_are_excluded(tiny_bundle, monkeypatch):
    monkeypatch.setattr(
        serving.runners.autotune,
        "missing",
        lambda spec: RunnerError("no") if spec.runtime == "openvino" else None,
    )
    runtimes = [spec.runtime for spec in passed(tiny_bundle, "text")]
    assert runtimes == ["onnxruntime"] * 3


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_fastest_is_first(tiny_bundle, monkeypatch, tower):
    names = ["onnxruntime:fp32", "openvino:fp32", "openvino:int8"]
    slow_down(monkeypatch, {name: repeat(ms) for name, ms in zip(names, (60, 1, 30), strict=True)})
    timed = time_runners(tiny_bundle, tower, specs(*names))
    assert [latency.runner for latency in timed] == [names[1], names[2], names[0]]
    assert [latency.milliseconds for latency in timed] == pytest.approx([1, 30, 60])
    assert {(t.tower, t.batch, t.machine) for t in timed} == {(tower, BATCH, describe())}


LOOKS = 1 + 2 * 2
"""Runs before the timed rounds: one for allocation, and two probes of one warm-up and one timed
run."""


def test_latency_is_the_median_after_warm_up(tiny_bundle, monkeypatch):
    """Slow first runs and three outliers among seven runs do not affect the latency."""
    counted = chain.from_iterable((0, wait) for wait in (150, 20, 20, 150, 20, 20, 150))
    waits = chain([140] * LOOKS, counted)
    slow_down(monkeypatch, {"onnxruntime:fp32": waits})
    (latency,) = time_runners(tiny_bundle, "image", specs("onnxruntime:fp32"))
    assert latency.milliseconds == pytest.approx(20)


def test_busy_machine_during_a_probe_does_not_decide(tiny_bundle, monkeypatch):
    """The faster runner is probed while the machine is busy, but wins the timed rounds."""
    names = ["onnxruntime:fp32", "openvino:fp32"]
    waits = {names[0]: repeat(60), names[1]: chain([75] * LOOKS, repeat(30))}
    slow_down(monkeypatch, waits)
    timed = time_runners(tiny_bundle, "image", specs(*names))
    assert [latency.runner for latency in timed] == [names[1], names[0]]
    assert [latency.milliseconds for latency in timed] == pytest.approx([30, 60])


def test_equally_busy_rounds_keep_the_order(tiny_bundle, monkeypatch):
    """Three slow rounds of seven do not change the order."""
    names, busy = ["onnxruntime:fp32", "openvino:fp32"], [110] * (2 * 3)
    waits = {
        names[0]: chain([30] * LOOKS, busy, repeat(30)),
        names[1]: chain([55] * LOOKS, busy, repeat(55)),
    }
    slow_down(monkeypatch, waits)
    timed = time_runners(tiny_bundle, "image", specs(*names))
    assert [latency.runner for latency in timed] == names
    assert [latency.milliseconds for latency in timed] == pytest.approx([30, 55])


def test_slow_runner_gets_no_timed_rounds(tiny_bundle, monkeypatch):
    """The slow runner has waits for its probes only. Its position in the order does not matter."""
    names = ["openvino:int8", "openvino:fp32", "onnxruntime:int8"]
    for order in (names, names[::-1]):
        waits = {names[0]: repeat(30), names[1]: repeat(50), names[2]: repeat(120, LOOKS)}
        slow_down(monkeypatch, waits)
        timed = time_runners(tiny_bundle, "image", specs(*order))
        assert [latency.runner for latency in timed] == names


def test_runner_that_was_only_probed_is_not_first(tiny_bundle, monkeypatch):
    """The machine becomes busy after the probes, so the probe of the slow runner is the lowest
    time."""
    names = ["openvino:int8", "onnxruntime:int8"]
    waits = {names[0]: chain([10] * LOOKS, repeat(120)), names[1]: repeat(60, LOOKS)}
    slow_down(monkeypatch, waits)
    timed = time_runners(tiny_bundle, "image", specs(*names))
    assert [latency.runner for latency in timed] == names
    assert [latency.milliseconds for latency in timed] == pytest.approx([120, 60])


def unloadable(bundle: Bundle, tmp_path: Path, name: str, graph: bytes) -> Bundle:
    """A copy of the bundle whose graph `name` is in the manifest but cannot be run."""
    path = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (path / name).write_bytes(graph)
    copied = Bundle(path, bundle.manifest)
    return with_artifacts(
        copied,
        lambda a: replace(a, files=(describe_file(path / name),)) if a.file == name else a,
    )


def test_runner_that_cannot_run_is_excluded(tiny_bundle, tmp_path, unloadable_graph):
    bundle = unloadable(tiny_bundle, tmp_path, "text.int8.onnx", unloadable_graph)
    runners = specs("openvino:int8", "onnxruntime:fp32", "onnxruntime:int8")
    assert [t.runner for t in time_runners(bundle, "text", runners)] == ["onnxruntime:fp32"]


def test_no_runnable_runner_is_an_error(tiny_bundle, tmp_path, unloadable_graph):
    bundle = unloadable(tiny_bundle, tmp_path, "text.int8.onnx", unloadable_graph)
    expected = (
        r"bundle: no runner for the text tower: openvino:int8: OpenVINO cannot load .*; "
        r"onnxruntime:int8: ONNX Runtime cannot load "
    )
    with pytest.raises(BundleError, match=f"(?s){expected}"):
        time_runners(bundle, "text", specs("openvino:int8", "onnxruntime:int8"))


def test_no_passed_runner_is_an_error(tiny_bundle):
    expected = r"no runner for the image tower: none passed the parity gate"
    with pytest.raises(BundleError, match=expected):
        time_runners(tiny_bundle, "image", [])


def test_tampered_graph_is_an_error(tiny_bundle, tmp_path):
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    (path / "text.int8.onnx").write_bytes(b"tampered")
    with pytest.raises(BundleError, match="is not the file that was exported"):
        time_runners(
            Bundle(path, tiny_bundle.manifest),
            "text",
            specs("onnxruntime:fp32", "onnxruntime:int8"),
        )


def test_short_context_is_timed(tiny_bundle):
    """The only bucket is the context length. The graph accepts any length up to 77."""
    text = replace(tiny_bundle.manifest.text, context_length=6)
    bundle = Bundle(tiny_bundle.path, replace(tiny_bundle.manifest, text=text))
    (latency,) = time_runners(bundle, "text", specs("onnxruntime:fp32"))
    assert latency.milliseconds > 0


def test_unknown_runner_is_an_error(tiny_bundle):
    with pytest.raises(BundleError, match="unknown runner 'openvino:int7'") as raised:
        time_runners(tiny_bundle, "text", specs("openvino:int7"))
    assert not isinstance(raised.value, RunnerError)
