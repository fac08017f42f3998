"""OpenVINO: equals eager within the tolerance of each precision, and runs in the requested
precision."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino
import pytest

from export.checkpoints.load import load_checkpoint
from export.gate.parity import Expected
from export.gate.torch_runners import EagerRunner
from export.gate.verify import judged
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import TOLERANCES
from serving.errors import BundleError, RunnerError
from serving.runners.open_vino import OpenVinoRunner
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec
from serving.util.machine import cpu_count
from tests.support.references import some_ids, some_pixels

BATCHES = {
    "image": [some_pixels(n, 32, seed=n) for n in (1, 2, 5, 17)],
    "text": [
        some_ids([1], 2),
        some_ids([1, 5, 7], 8),
        some_ids([3, 30, 47, 9], 48),
        some_ids([3, 30, 76, 9, 1], 77),
    ],
}
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
PRECISIONS = [
    "fp32",
    pytest.param("bf16", marks=pytest.mark.skipif(not BF16, reason="this CPU has no bfloat16")),
    "fp16",
    "int8",
]


@pytest.fixture(scope="module")
def wanted(tiny_checkpoint) -> dict[str, list[np.ndarray]]:
    """Embeddings of BATCHES by eager float32."""
    clip = load_checkpoint(str(tiny_checkpoint)).clip
    made = {}
    for tower, module in (("image", clip.image), ("text", clip.text)):
        with EagerRunner(module) as eager:
            made[tower] = [eager.run(batch) for batch in BATCHES[tower]]
    return made


def opened(bundle: Bundle, precision: str, **options) -> OpenVinoRunner:
    """The image tower's runner of a precision, not yet entered."""
    return OpenVinoRunner(bundle, "image", RunnerSpec("openvino", precision), **options)


def property_of(runner: OpenVinoRunner, name: str):
    """Return a property of the compiled model."""
    return runner._loaded.get_compiled_model().get_property(name)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvino_equals_eager_at_every_batch_size(tiny_bundle, wanted, tower, precision):
    with open_runner(tiny_bundle, tower, f"openvino:{precision}") as runner:
        assert runner.name == f"openvino:{precision}"
        assert re.fullmatch(r"openvino 20\d\d\.\d+\.\d+", runner.runtime_version)
        worst = 1.0
        for batch, want in zip(BATCHES[tower], wanted[tower], strict=True):
            got = runner.run(batch)
            assert (got.dtype, got.shape) == (np.float32, want.shape)
            np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
            worst = min(worst, float((got * want).sum(axis=1).min()))
            if precision == "fp32":
                np.testing.assert_allclose(got, want, atol=1e-5)
    assert worst >= TOLERANCES[precision].min_cosine


@pytest.mark.parametrize("precision", [PRECISIONS[1], "int8"])
def test_low_precision_differs_from_float32(tiny_bundle, wanted, precision):
    with open_runner(tiny_bundle, "image", f"openvino:{precision}") as runner:
        got = runner.run(BATCHES["image"][3])
    assert np.abs(got - wanted["image"][3]).max() > 1e-5


@pytest.mark.parametrize(
    ("precision", "hint"),
    [("fp32", "f32"), ("fp16", "f32"), ("int8", "bf16" if BF16 else "f32"), ("bf16", "bf16")],
)
def test_compiled_model_has_the_requested_precision(tiny_bundle, precision, hint):
    if precision == "bf16" and not BF16:
        pytest.skip("this CPU has no bfloat16")
    with open_runner(tiny_bundle, "text", f"openvino:{precision}") as runner:
        assert property_of(runner, "INFERENCE_PRECISION_HINT").to_string() == hint


@pytest.mark.parametrize("tower", ["image", "text"])
def test_int8_products_run_in_int8(tiny_bundle, tower):
    """OpenVINO fuses our Q/DQ pairs into INT8 kernels, according to its runtime model."""
    with open_runner(tiny_bundle, tower, "openvino:int8") as runner:
        model = runner._loaded.get_compiled_model().get_runtime_model()
    kinds = [node.get_rt_info() for node in model.get_ops()]
    products = [k for k in kinds if k["layerType"].astype(str) in ("FullyConnected", "MatMul")]
    low = [k for k in products if k["runtimePrecision"].astype(str) in ("i8", "u8")]
    # Two blocks of six products. Query, key and value may be merged into one.
    assert 2 * 4 <= len(low) <= 2 * 6


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_result_is_not_overwritten_by_the_next_run(tiny_bundle, tower, precision):
    """The next run must not write into the array that the previous run returned."""
    one, two = BATCHES[tower][1], BATCHES[tower][1].copy()
    two[:] = two[::-1]
    with open_runner(tiny_bundle, tower, f"openvino:{precision}") as runner:
        first = runner.run(one)
        kept = first.copy()
        runner.run(two)
        assert np.array_equal(first, kept)
    assert np.array_equal(first, kept)


def test_strided_batches_are_accepted(tiny_bundle, wanted):
    """OpenVINO shares the memory of inputs without a copy, so strides must be respected."""
    batch = BATCHES["image"][2]
    view = np.ascontiguousarray(batch.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not view.flags.c_contiguous
    read_only = batch.copy()
    read_only.flags.writeable = False
    with open_runner(tiny_bundle, "image", "openvino:fp32") as runner:
        for given in (view, batch[::2], read_only):
            want = wanted["image"][2][::2] if len(given) == 3 else wanted["image"][2]
            np.testing.assert_allclose(runner.run(given), want, atol=1e-5)


@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (2, 2), (None, cpu_count())])
def test_thread_count_is_set(tiny_bundle, threads, expected):
    with opened(tiny_bundle, "fp32", threads=threads) as runner:
        assert property_of(runner, "INFERENCE_NUM_THREADS") == expected
        assert property_of(runner, "NUM_STREAMS") == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_closed_runner_is_rejected(tiny_bundle, when):
    runner = open_runner(tiny_bundle, "image", "openvino:int8")
    if when == "after":
        with runner:
            runner.run(BATCHES["image"][0])
    with pytest.raises(RunnerError, match=r"openvino:int8 is not open; use it in a `with`"):
        runner.run(BATCHES["image"][0])


def test_runner_can_be_opened_again(tiny_bundle):
    runner, results = open_runner(tiny_bundle, "text", "openvino:fp32"), []
    for _ in range(2):
        with runner:
            results.append(runner.run(BATCHES["text"][1]))
    assert np.array_equal(*results)


@pytest.mark.parametrize("name", ["openvino:int7", "openvino:int8-dynamic"])
def test_unsupported_precision_is_rejected(tiny_bundle, name):
    expected = f"unknown runner '{name}'; expected .*openvino:fp32, openvino:bf16"
    with pytest.raises(RunnerError, match=expected):
        open_runner(tiny_bundle, "image", name)


class Older:
    """The capabilities that OpenVINO reports on a CPU without bfloat16."""

    def get_property(self, device: str, name: str) -> list[str]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return ["WINOGRAD", "FP32", "INT8", "BIN", "EXPORT_IMPORT"]


def test_bf16_requires_bfloat16_instructions(tiny_bundle):
    expected = (
        r"openvino:bf16: this CPU has no bfloat16 \(avx512_bf16 or amx_bf16\); use openvino:fp32"
    )
    with pytest.raises(RunnerError, match=expected):
        opened(tiny_bundle, "bf16")._hint(Older())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_other_precisions_run_in_float32_without_bfloat16(tiny_bundle, precision):
    assert opened(tiny_bundle, precision)._hint(Older()) == "f32"


def test_bf16_gets_no_verdict_without_bfloat16(tiny_bundle, monkeypatch):
    """It neither passes nor fails, so it is not assembled. The other runners get verdicts."""
    if BF16:
        hint = OpenVinoRunner._hint
        monkeypatch.setattr(OpenVinoRunner, "_hint", lambda self, _: hint(self, Older()))
    with open_runner(tiny_bundle, "image", "onnxruntime:fp32") as runner:
        probes = [(batch, runner.run(batch)) for batch in BATCHES["image"][:1]]
    expected = Expected(probes=probes, labelled=None)
    said: list[str] = []
    artifact = judged(
        tiny_bundle,
        tiny_bundle.artifact("image", "fp32"),
        expected,
        lambda step, done=0, total=0: said.append(step),
    )
    assert any("openvino:bf16: this CPU has no bfloat16" in step for step in said)
    assert [v.runner for v in artifact.verdicts] == ["onnxruntime:fp32", "openvino:fp32"]
    assert not artifact.passed("openvino:bf16")


CORE = openvino.Core


class Deaf:
    """`openvino.Core` of a runtime that compiles in another precision than requested."""

    def __init__(self) -> None:
        self._core = CORE()

    def __getattr__(self, name: str):
        return getattr(self._core, name)

    def compile_model(self, model, device, properties):
        properties = properties | {"INFERENCE_PRECISION_HINT": "f32"}
        return self._core.compile_model(model, device, properties)


@pytest.mark.skipif(not BF16, reason="this CPU has no bfloat16")
def test_other_precision_than_requested_is_rejected(tiny_bundle, monkeypatch):
    monkeypatch.setattr("serving.runners.open_vino.openvino.Core", Deaf)
    with pytest.raises(RunnerError, match="openvino:bf16: asked OpenVINO for bf16, and got f32"):
        opened(tiny_bundle, "bf16").__enter__()
    with opened(tiny_bundle, "fp32"):
        pass


def test_files_are_verified_on_entering(tiny_bundle, tmp_path, unloadable_graph):
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    file = path / "image.int8.onnx"
    file.write_bytes(b"something else")
    runner = open_runner(Bundle.open(path), "image", "openvino:int8")
    with pytest.raises(BundleError, match=r"image\.int8\.onnx is not the file that was exported"):
        runner.__enter__()
    file.write_bytes(unloadable_graph)
    artifacts = tuple(
        replace(a, files=(describe_file(file),)) if a.file == file.name else a
        for a in tiny_bundle.manifest.artifacts
    )
    vouched = Bundle(path, replace(tiny_bundle.manifest, artifacts=artifacts))
    with pytest.raises(RunnerError, match=rf"openvino:int8: OpenVINO cannot load {path}"):
        open_runner(vouched, "image", "openvino:int8").__enter__()
