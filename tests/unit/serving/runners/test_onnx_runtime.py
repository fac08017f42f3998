"""Runners of exported graphs: they equal eager PyTorch and report clear errors."""

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from export.checkpoints.load import load_checkpoint
from export.gate.torch_runners import EagerRunner
from export.precisions import Precision
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import TOLERANCES
from serving.errors import BundleError, RunnerError
from serving.runners.onnx_runtime import OnnxRuntimeRunner
from serving.runners.registry import missing, open_runner
from serving.runners.spec import RUNNERS, RUNTIMES, RunnerSpec, graph_of, runners_of
from serving.util.machine import cpu_count
from serving.util.nvidia import gpu
from tests.support.references import some_ids, some_pixels

BATCHES = {
    "image": [some_pixels(1, 32), some_pixels(7, 32, seed=1)],
    "text": [some_ids([1], 2), some_ids([1, 5, 7], 8), some_ids([3, 30, 76, 9], 77)],
}


FP32 = RunnerSpec("onnxruntime", "fp32")


@pytest.fixture(scope="module")
def clip(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint)).clip


@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_runtime_equals_eager(tiny_bundle, clip, tower):
    module = clip.image if tower == "image" else clip.text
    with (
        open_runner(tiny_bundle, tower, "onnxruntime:fp32") as runner,
        EagerRunner(module) as eager,
    ):
        assert (runner.name, runner.spec) == ("onnxruntime:fp32", FP32)
        assert runner.runtime_version == f"onnxruntime {onnxruntime.__version__}"
        assert (eager.name, eager.runtime_version) == ("eager:fp32", f"torch {torch.__version__}")
        for batch in BATCHES[tower]:
            got = runner.run(batch)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, eager.run(batch), atol=1e-5)


def test_eager_runner_puts_the_tower_into_eval_mode(clip):
    clip.image.train()
    with EagerRunner(clip.image):
        assert not clip.image.training


@pytest.mark.parametrize("when", ["before", "after"])
def test_closed_runner_is_rejected(tiny_bundle, when):
    runner = open_runner(tiny_bundle, "image", "onnxruntime:fp32")
    if when == "after":
        with runner:
            runner.run(BATCHES["image"][0])
    with pytest.raises(RunnerError, match=r"onnxruntime:fp32 is not open; use it in a `with`"):
        runner.run(BATCHES["image"][0])


def test_runner_can_be_opened_again(tiny_bundle):
    runner = open_runner(tiny_bundle, "text", "onnxruntime:fp32")
    results = []
    for _ in range(2):
        with runner:
            results.append(runner.run(BATCHES["text"][1]))
    assert np.array_equal(*results)


@pytest.mark.parametrize("name", ["tensorflow:fp32", "onnxruntime:int7"])
def test_unknown_runner_error_lists_known_runners(tiny_bundle, name):
    with pytest.raises(RunnerError, match=f"unknown runner '{name}'; expected .*onnxruntime:fp32"):
        open_runner(tiny_bundle, "image", name)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime:", ":fp32", "", "fp32", "a:b:c"])
def test_malformed_runner_name_error_shows_an_example(tiny_bundle, name):
    with pytest.raises(RunnerError, match=f"^'{name}' does not name a runner; give one such as "):
        open_runner(tiny_bundle, "image", name)


def test_runner_spec_round_trip():
    assert [RunnerSpec.parse(str(spec)) for spec in RUNNERS] == list(RUNNERS)
    assert str(RunnerSpec("openvino", "int8")) == "openvino:int8"


def test_precision_missing_in_the_bundle_is_rejected(tiny_bundle):
    artifacts = tuple(a for a in tiny_bundle.manifest.artifacts if a.tower == "image")
    only = Bundle(tiny_bundle.path, replace(tiny_bundle.manifest, artifacts=artifacts))
    open_runner(only, "image", "onnxruntime:fp32")
    with pytest.raises(BundleError, match=r"has no fp32 text graph, only none"):
        open_runner(only, "text", "onnxruntime:fp32")


def test_files_are_verified_on_entering(tiny_bundle, tmp_path):
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    (path / "image.fp32.onnx").write_bytes(b"something else")
    runner = open_runner(Bundle.open(path), "image", "onnxruntime:fp32")
    with pytest.raises(BundleError, match=r"image\.fp32\.onnx is not the file that was exported"):
        runner.__enter__()


def test_unloadable_graph_is_rejected(tiny_bundle, tmp_path):
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    file = path / "image.fp32.onnx"
    file.write_bytes(b"\x08\x63")  # a protobuf message with ir_version 99
    artifacts = tuple(
        replace(a, files=(describe_file(file),)) if a.file == file.name else a
        for a in tiny_bundle.manifest.artifacts
    )
    bundle = Bundle(path, replace(tiny_bundle.manifest, artifacts=artifacts))
    expected = rf"onnxruntime:fp32: ONNX Runtime cannot load {re.escape(str(file))}"
    with pytest.raises(RunnerError, match=expected):
        open_runner(bundle, "image", "onnxruntime:fp32").__enter__()


@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (3, 3), (None, cpu_count())])
def test_thread_count_is_set(tiny_bundle, threads, expected):
    with OnnxRuntimeRunner(tiny_bundle, "image", FP32, threads=threads) as runner:
        options = runner._loaded.get_session_options()
        assert options.intra_op_num_threads == expected
        assert options.inter_op_num_threads == 1
        assert runner._loaded.get_providers() == ["CPUExecutionProvider"]


def test_threads_do_not_spin_after_a_run(tiny_bundle):
    """ONNX Runtime's default uses 45 ms of another CPU's time after a run."""
    pixels, after = some_pixels(8, 32), []
    with OnnxRuntimeRunner(tiny_bundle, "image", FP32, threads=2) as runner:
        for _ in range(3):
            runner.run(pixels)
            start = time.process_time()
            time.sleep(0.08)
            after.append(time.process_time() - start)
    assert min(after) < 0.01


@pytest.mark.parametrize("name", ["onnxruntime-cuda:fp16", "onnxruntime-tensorrt:int8-fp16"])
def test_gpu_runners_require_a_gpu(tiny_bundle, name):
    if gpu() is not None:
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(RunnerError, match=f"{name}: this machine has no NVIDIA GPU, or no driver"):
        open_runner(tiny_bundle, "image", name)


@pytest.mark.filterwarnings("ignore:Specified provider")  # ONNX Runtime's, before it falls back
@pytest.mark.parametrize("runtime", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_fallback_to_the_cpu_is_rejected(tiny_bundle, runtime):
    """ONNX Runtime itself would fall back without an error."""
    provider = RUNTIMES[runtime].provider
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    runner = OnnxRuntimeRunner(tiny_bundle, "image", RunnerSpec(runtime, "fp16"))
    expected = rf"{runtime}:fp16: asked ONNX Runtime for {provider}, got \['CPU"
    with pytest.raises(RunnerError, match=expected):
        runner.__enter__()


def test_every_runner_has_a_known_runtime_and_precision():
    for spec in RUNNERS:
        assert spec.precision in TOLERANCES
        assert graph_of(spec) in {precision.value for precision in Precision}
        error = missing(spec)
        assert error is None or "pip install" in error.advice or "GPU" in error.reason


def test_runners_of_an_artifact_match_its_graph_and_precision(tiny_bundle):
    graph = tiny_bundle.artifact("image", "int8")
    assert list(map(str, runners_of(graph))) == [
        *("onnxruntime:int8", "onnxruntime-cuda:int8", "onnxruntime-tensorrt:int8"),
        "openvino:int8",
    ]
    prefix_tree = replace(graph, graph="prefix_tree")
    assert list(map(str, runners_of(prefix_tree))) == ["onnxruntime:int8", "openvino:int8"]
    assert runners_of(replace(graph, kind="torchscript")) == []
