"""`python -m benchmarks gpu`: the whole way on the CPU, and on a GPU where there is one."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import benchmarks.gpu
import export.pipeline
from benchmarks.__main__ import app
from benchmarks.gpu import measure
from benchmarks.gpu_report import Plan, tables
from benchmarks.machine.limits import count_flops, measure_limits, require, timed
from benchmarks.subject import load
from export.checkpoints.load import load_checkpoint
from export.gate.parity import expect, judge
from export.gate.torch_runners import CompiledRunner, EagerRunner, TorchScriptRunner
from export.graphs.torchscript import export_torchscript
from export.towers.clip import half_precision
from export.towers.transformer import LayerNorm
from serving.bundles.manifest import TOLERANCES, TOWERS, Tolerance
from serving.errors import RunnerError
from serving.runners.registry import missing
from serving.util.nvidia import Gpu
from serving.util.progress import silent
from tests.support.references import some_ids, some_pixels

BATCHES = {"image": some_pixels(3, 32), "text": some_ids([1, 5, 15], 16)}
CUDA = torch.cuda.is_available()
without_gpu = pytest.mark.skipif(CUDA, reason="this machine has a GPU")
with_gpu = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # Inductor's advice to allow TF32, among others
    pytest.mark.skipif(not CUDA, reason="torch sees no NVIDIA GPU here"),
]


@pytest.fixture(scope="module", autouse=True)
def traced_once(kept_graphs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.pipeline, "export_onnx", kept_graphs)
        yield


@pytest.fixture(scope="module")
def clip(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint)).clip


@pytest.fixture
def plan(tiny_checkpoint, tmp_path):
    return make_plan(tiny_checkpoint, tmp_path, "eager:fp32")


def make_plan(checkpoint, folder, *runners, **others) -> Plan:
    settings = {"batches": [1, 3], "rounds": 3, "device": "cpu", "matmul_size": 64}
    settings |= {"models": [str(checkpoint)], "bundles": folder / "bundles", "copy_bytes": 1 << 20}
    return Plan(runners=runners, **(settings | others))


@pytest.fixture(scope="module", autouse=True)
def _short_rounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks.machine.limits, "_WARM_UP_SECONDS", 0.01)
        patch.setattr(benchmarks.machine.limits, "_ROUND_SECONDS", 0.005)
        yield


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, tmp_path_factory):
    """A report of everything that a CPU has, without OpenVINO, and its file."""
    folder = tmp_path_factory.mktemp("gpu")
    runners = ("eager:*", "torchscript:fp32", "onnxruntime:fp32", "openvino:fp32")

    def without_open_vino(name):
        return "no such package" if name.startswith("openvino") else missing(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks.gpu, "missing", without_open_vino)
        plan = make_plan(tiny_checkpoint, folder, *runners)
        return measure(plan, folder / "new" / "report.json", silent), folder


def test_every_runner_is_timed_on_every_batch(measured):
    report, _ = measured
    rows = {(r.runner, r.tower, r.batch, r.length): r for r in report.rows}
    assert len(rows) == len(report.rows)
    runners = {"eager:fp32", "eager:fp16", "eager:bf16", "torchscript:fp32", "onnxruntime:fp32"}
    works = {("image", None), ("text", 77), ("text", 16)}
    assert set(rows) == {(r, t, b, n) for r in runners for t, n in works for b in (1, 3)}
    for row in report.rows:
        low, high = row.milliseconds_host_range
        assert 0 < low <= row.milliseconds_host <= high
        assert (row.milliseconds_device is None) == (row.runner == "onnxruntime:fp32")
        best = row.milliseconds_device or row.milliseconds_host
        assert row.tflops == pytest.approx(row.gflop / best)
        rate = report.limits.matmul_tflops[row.runner.partition(":")[2]]
        assert row.matmul_tflops == rate
        assert row.fraction == pytest.approx(row.tflops / rate)
        assert row.first_call_seconds > 0
        assert row.runtime_version.split()[0] in ("torch", "onnxruntime")


def test_every_runner_is_judged_first(measured):
    report, _ = measured
    assert {(g.verdict.runner, g.tower) for g in report.gates} == {
        (row.runner, row.tower) for row in report.rows
    }
    for gate in report.gates:
        mine = [
            (row.passed, row.min_cosine)
            for row in report.rows
            if (row.runner, row.tower) == (gate.verdict.runner, gate.tower)
        ]
        assert set(mine) == {(True, gate.verdict.min_cosine)}
        assert gate.verdict.embeddings == (8 if gate.tower == "image" else 16)
    cosines = {row.runner: row.min_cosine for row in report.rows}
    assert cosines["eager:bf16"] < cosines["eager:fp16"] < cosines["eager:fp32"]


def test_what_cannot_be_had_is_named(measured):
    report, _ = measured
    left_out = {left.what: left.reason for left in report.left_out}
    assert left_out.pop("openvino:fp32") == "no such package"
    assert set(left_out) == {f"tiny-clip, {tower} tower, eager:tf32" for tower in TOWERS}
    assert all("only NVIDIA GPUs compute in TF32" in reason for reason in left_out.values())


def test_the_file_is_the_report(measured):
    report, folder = measured
    document = json.loads((folder / "new" / "report.json").read_text())
    assert document == json.loads(report.to_json())
    assert document["plan"]["bundles"] == str(folder / "bundles")
    where = document["environment"]
    assert where["libraries"]["torch"] == torch.__version__
    assert where["torch_cuda"] == torch.version.cuda
    assert where["date"].endswith("+00:00")
    assert where["machine"]
    limits = document["limits"]
    assert set(limits["matmul_tflops"]) == {"fp32", "fp16", "bf16", "int8"}
    assert set(document["limits_at_end"]) == set(limits)


def test_tables_show_every_row(measured):
    report, _ = measured
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        for table in tables(report):
            console.print(table)
    shown = console.export_text()
    for title in ("image tower", "text tower, 77 tokens", "text tower, 16 tokens"):
        assert f"tiny-clip, {title}" in shown
    assert shown.count("torchscript:fp32") == 6 + 2
    assert shown.count("passed") == len(report.rows) + len(report.gates)


def column_of(table, header="gate"):
    return list(next(c for c in table.columns if c.header == header).cells)


def test_command(measured, monkeypatch, tmp_path):
    """With the measuring itself, which needs a GPU, replaced."""
    report, _ = measured
    asked = []

    def instead(plan, output, progress):
        asked.append((plan, output))
        return report

    monkeypatch.setattr(benchmarks.gpu, "measure", instead)
    monkeypatch.setattr(benchmarks.machine.limits, "require", lambda device: None)
    options = ["--model", "a", "--model", "b", "--batch", "4", "--runner", "eager*"]
    options += ["--budget", "7", "--rounds", "5", "--output", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, ["gpu", *options])
    assert done.exit_code == 0, done.output
    plan = Plan(models=["a", "b"], batches=[4], runners=["eager*"], budget=7, rounds=5)
    assert asked == [(plan, tmp_path / "r.json")]
    assert "left out: openvino:fp32: no such package" in done.output
    done = CliRunner().invoke(app, ["gpu", "--json"])
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(report.to_json())
    assert asked[1][0] == Plan()


def test_what_the_gate_refuses_is_listed_and_marked(plan, monkeypatch):
    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(min_cosine=1.1, relative_accuracy=1))
    report = measure(plan, None, silent)
    assert len(report.rows) == 6
    assert not any(row.passed for row in report.rows)
    assert all("refused" in column_of(table) for table in list(tables(report))[1:])
    assert all(row.min_cosine > 0.999 for row in report.rows)


def test_a_spent_budget_starts_nothing_and_says_so(tiny_checkpoint, tmp_path):
    plan = make_plan(tiny_checkpoint, tmp_path, "eager:fp32", "onnxruntime:fp32", budget=0)
    output = tmp_path / "report.json"
    report = measure(plan, output, silent)
    assert not report.rows
    assert {(left.what, left.reason) for left in report.left_out} == {
        (f"tiny-clip, {tower} tower, {name}", "the budget was spent")
        for tower in TOWERS
        for name in plan.runners
    }
    assert json.loads(output.read_text())["limits"]["matmul_tflops"]
    assert not (tmp_path / "bundles").exists()


def test_a_budget_spent_between_batches_keeps_what_was_measured(plan, monkeypatch, tmp_path):
    left = iter([100.0] * 3)  # of a runner, of its first batch, and what a row may take
    monkeypatch.setattr(benchmarks.gpu._Session, "left", property(lambda _: next(left, 0.0)))
    report = measure(plan, tmp_path / "report.json", silent)
    assert [(row.tower, row.batch) for row in report.rows] == [("image", 1)]
    assert [left.reason for left in report.left_out] == ["the budget was spent"] * 2
    assert report.left_out[0].what == "tiny-clip, image 3, eager:fp32, and what follows"
    assert len(json.loads((tmp_path / "report.json").read_text())["rows"]) == 1


def test_a_row_that_would_take_too_long_is_left_out(plan, monkeypatch):
    monkeypatch.setattr(benchmarks.gpu, "ROW_SECONDS", 0.0)
    report = measure(plan, None, silent)
    assert [(row.tower, row.batch) for row in report.rows] == [("image", 1), ("text", 1)]
    assert len(report.left_out) == 4
    assert report.left_out[0].what == "tiny-clip, image 3, eager:fp32"
    assert report.left_out[0].reason.startswith("expected to take")


def test_a_runner_that_breaks_costs_only_itself(tiny_checkpoint, tmp_path, monkeypatch):
    opened = EagerRunner._module

    def broken(runner):
        if runner.precision == "fp16":
            raise ZeroDivisionError("a library's own")
        module = opened(runner)
        return module if runner.precision == "fp32" else lambda batch: batch.no_such_thing

    monkeypatch.setattr(EagerRunner, "_module", broken)
    report = measure(make_plan(tiny_checkpoint, tmp_path, "eager:*"), None, silent)
    assert {row.runner for row in report.rows} == {"eager:fp32"}
    reasons = {left.what: left.reason for left in report.left_out}
    assert reasons["tiny-clip, image tower, eager:fp16"] == "ZeroDivisionError: a library's own"
    assert "cannot run uint8 [8, 3, 32, 32]" in reasons["tiny-clip, image tower, eager:bf16"]
    assert "cannot run int32 [8, " in reasons["tiny-clip, text tower, eager:bf16"]


def test_the_file_is_whole_after_every_row(plan, monkeypatch, tmp_path):
    output, measured = tmp_path / "report.json", benchmarks.gpu._Session._row
    written = []

    def row(session, *arguments):
        written.append(len(json.loads(output.read_text())["rows"]))
        return measured(session, *arguments)

    monkeypatch.setattr(benchmarks.gpu._Session, "_row", row)
    measure(plan, output, silent)
    assert written == [0, 1, 2, 3, 4, 5]


def test_a_device_that_is_broken_at_the_end_costs_no_numbers(plan, monkeypatch, tmp_path):
    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def first(*arguments, **options):
        monkeypatch.setattr(benchmarks.gpu, "measure_limits", broken)
        return measure_limits(*arguments, **options)

    monkeypatch.setattr(benchmarks.gpu, "measure_limits", first)
    report = measure(plan, tmp_path / "report.json", silent)
    assert [left.what for left in report.left_out] == ["the device itself at the end"]
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["limits_at_end"] is None
    assert len(document["rows"]) == 6
    assert len(list(tables(report))) == 1 + 1 + 3


def test_an_export_that_fails_is_tried_once(tiny_checkpoint, tmp_path, monkeypatch):
    import export.pipeline

    calls = []

    def broken(*arguments):
        calls.append(arguments)
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(export.pipeline, "build", broken)
    report = measure(make_plan(tiny_checkpoint, tmp_path, "onnxruntime:fp*"), None, silent)
    assert len(calls) == 1
    assert len(report.left_out) == 4
    for left in report.left_out:
        assert left.reason.startswith("no graphs in fp16, fp32: ModuleNotFoundError: No module")


def test_plans_are_built_once_for_all_batches(tiny_checkpoint, tmp_path):
    """By TensorRT-RTX, which needs no GPU for that; running them is left to machines with one."""
    plan = make_plan(tiny_checkpoint, tmp_path, "tensorrt-rtx:fp16", batches=[1, 80])
    subject = load(str(tiny_checkpoint), plan, silent)
    graphs = subject.bundle(plan.bundles, frozenset({"fp16"}), silent)
    made = subject.with_plans(graphs, "tensorrt-rtx", "fp16", 80, silent)
    for tower in TOWERS:
        (found,) = made.plans(tower, "fp16", "tensorrt-rtx")
        assert {profile.maximum[0] for profile in found.engine.profiles} == {80}
    assert subject.with_plans(graphs, "tensorrt-rtx", "fp16", 80, silent) is made


def test_counted_operations_are_those_by_hand(clip):
    """Two an element of every product: the last block computes its queries for one token."""
    width, mlp, dim, patch, patches = 64, 256, 32, 3 * 8 * 8, 16

    def blocks(tokens):
        first = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
        last = (2 * tokens + 2) * width**2 + 2 * tokens * width + 2 * width * mlp
        return first + last

    image = patches * patch * width + blocks(patches + 1) + width * dim
    assert count_flops(clip.config, "image", 1) == 2 * image
    assert count_flops(clip.config, "image", 5) == 10 * image
    for length in (16, 77):
        text = blocks(length) + width * dim
        assert count_flops(clip.config, "text", 3, length) == 6 * text


def test_times_are_of_one_call_and_warmed_up():
    calls = []

    def call():
        time.sleep(0.5 if not calls else 0.001)
        calls.append(1)

    seconds = timed(call, "cpu", 5)
    assert len(seconds) == 5
    assert 0.001 <= median(seconds) < 0.1
    assert len(calls) > 10, "a round did not repeat what is short"


def test_limits_are_of_the_device():
    limits = measure_limits("cpu", 3, size=64, copy_bytes=1 << 16)
    assert all(rate > 0 for rate in limits.matmul_tflops.values())
    assert set(limits.matmul_tflops) | set(limits.without) == {"fp32", "fp16", "bf16", "int8"}
    assert (limits.matmul_size, limits.copy_bytes) == (64, 1 << 16)
    assert limits.copy_gb_per_s > 0


def test_a_precision_without_a_product_is_named(monkeypatch):
    monkeypatch.delattr(torch, "_int_mm")
    limits = measure_limits("cpu", 3, size=64, copy_bytes=1 << 10)
    assert "int8" not in limits.matmul_tflops
    assert "_int_mm" in limits.without["int8"]


@without_gpu
def test_a_machine_without_a_gpu_is_told_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--output", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "expected a machine with an NVIDIA GPU; this one has none" in done.stderr
    assert "python -m benchmarks latency BUNDLE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r.json").exists()


@without_gpu
def test_a_torch_that_cannot_use_the_gpu_is_told_so(monkeypatch):
    here = Gpu(name="NVIDIA H200", compute_capability="9.0", memory_bytes=1, cuda="13.0")
    monkeypatch.setattr(benchmarks.machine.limits, "gpu", lambda: here)
    with pytest.raises(RunnerError, match=r"a torch that can use the NVIDIA H200 .* CUDA 13\.0"):
        require("cuda")
    require("cpu")


def test_packages_that_it_cannot_do_without_are_named(monkeypatch):
    monkeypatch.setattr(
        "benchmarks.__main__.find_spec", lambda name: None if name in ("ftfy", "torch") else 1
    )
    done = CliRunner().invoke(app, ["gpu"])
    assert isinstance(done.exception, RunnerError)
    assert "needs the packages torch, ftfy; pip install" in str(done.exception)


def test_it_imports_no_more_than_it_says():
    """What a borrowed machine need not have is imported when its turn comes."""
    code = "import sys, benchmarks.__main__, benchmarks.gpu; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in tops
    assert not tops & {"onnx", "onnxscript", "onnxruntime", "openvino", "tritonclient", "tensorrt"}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precisions_on_the_cpu(clip, tower, precision):
    module = getattr(clip, tower)
    with EagerRunner(module) as reference, EagerRunner(module, "cpu", precision) as half:
        assert half.name == f"eager:{precision}"
        want, got = reference.run(BATCHES[tower]), half.run(BATCHES[tower])
        cosines = (want * got).sum(axis=1)
        assert TOLERANCES[precision].min_cosine < cosines.min() < 1 - 1e-7
        assert np.array_equal(half.launcher(BATCHES[tower])().numpy(), got)
    assert next(module.parameters()).dtype == torch.float32


def test_what_is_computed_in_bfloat16(clip):
    """Everything that is multiplied, and no constant of the boundary."""
    half = half_precision(clip.image, torch.bfloat16)
    assert half.encoder.blocks[0].mlp.up.weight.dtype == torch.bfloat16
    assert half.mean.dtype == torch.float32
    norms = [module for module in half.modules() if isinstance(module, LayerNorm)]
    assert {norm.weight.dtype for norm in norms} == {torch.float32}


@without_gpu
@pytest.mark.parametrize("kind", [EagerRunner, CompiledRunner])
def test_cuda_without_a_gpu_is_refused_on_entering(clip, kind):
    runner = kind(clip.image, "cuda", "bf16")
    with pytest.raises(RunnerError, match=rf"{kind.kind}-cuda:bf16 needs an NVIDIA GPU, and torch"):
        runner.__enter__()
    with pytest.raises(RunnerError, match="torchscript-cuda:fp32 needs an NVIDIA GPU"):
        TorchScriptRunner(Path("no-such-file"), "cuda").__enter__()


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["eager", "torchscript", "compiled"])
class TestOnGpu:
    """Against eager float32 on the CPU, by the tolerances of the gate."""

    pytestmark = with_gpu

    def test_parity(self, clip, tower, precision, kind, tmp_path):
        module = getattr(clip, tower)
        if kind == "torchscript":
            halves = {"fp16": torch.float16, "bf16": torch.bfloat16}
            half = halves.get(precision)
            export_torchscript(half_precision(module, half) if half else module, tmp_path / "t.pt")
            runner = TorchScriptRunner(tmp_path / "t.pt", "cuda", precision)
        else:
            runner = {"eager": EagerRunner, "compiled": CompiledRunner}[kind](
                module, "cuda", precision
            )
        batches = [BATCHES[tower], BATCHES[tower][:1]]
        with EagerRunner(module) as reference, runner:
            verdict = judge(runner, expect(reference, batches, None), tower)
            launched = runner.launcher(batches[0])()
            assert launched.device.type == "cuda"
            np.testing.assert_allclose(launched.cpu().numpy(), runner.run(batches[0]), atol=1e-3)
        assert verdict.runner == f"{kind}-cuda:{precision}"
        assert verdict.passed, verdict
        assert next(module.parameters()).device.type == "cpu", "the caller's tower was moved"


class TestMeasureOnGpu:
    """The whole way, where it is meant to go."""

    pytestmark = with_gpu

    def test_rows_have_both_times(self, tiny_checkpoint, tmp_path):
        plan = make_plan(
            tiny_checkpoint, tmp_path, "eager*", device="cuda", matmul_size=1024, budget=60
        )
        report = measure(plan, tmp_path / "report.json", silent)
        names = {row.runner for row in report.rows}
        assert names == {"eager:fp32"} | {
            f"eager-cuda:{precision}" for precision in ("fp32", "tf32", "fp16", "bf16")
        }
        for row in report.rows:
            on_gpu = row.runner != "eager:fp32"
            assert (row.milliseconds_device is not None) == on_gpu
            assert (row.fraction is not None) == on_gpu
        assert set(report.limits.matmul_tflops) >= {"fp32", "tf32", "fp16"}
