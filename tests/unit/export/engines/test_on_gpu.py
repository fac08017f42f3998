"""Engines of both libraries, run on a GPU if the machine has one."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.checkpoints.load import load_checkpoint
from export.engines.builder import EngineOptions
from export.engines.bundle_engines import add_engines
from export.gate.datasets import probes
from export.gate.parity import Expected, expect, judge
from export.gate.torch_runners import EagerRunner
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS
from serving.errors import RunnerError
from serving.runners.registry import missing, open_runner
from serving.runners.spec import RunnerSpec
from serving.runners.tensor_rt import TensorRtRunner
from tests.support.engine_builds import PRECISIONS
from tests.support.references import some_ids, some_pixels

MAX_BATCH = 8

pytest.importorskip("tensorrt_rtx_bindings", reason="no TensorRT-RTX: make setup")


BATCHES = {
    "image": [some_pixels(n, 32, seed=n) for n in (1, 3, 8, 9, 21)],
    "text": [
        some_ids([1], 2),
        some_ids([3, 30, 9], 32),
        some_ids([3, 32, 9], 33),
        some_ids([3, 30, 76, 9, 1], 77),
        some_ids(list(range(1, 20)), 24),
        some_ids(list(range(1, 12)), 48),
    ],
}
"""Some batches exceed MAX_BATCH, and lengths lie on both sides of the limit between the two
profiles."""


def with_plans(bundle: Bundle, path: Path, precisions: tuple[str, ...], **options: Any) -> Bundle:
    shutil.copytree(bundle.path, path, copy_function=os.link)
    facts = EngineOptions(max_batch=MAX_BATCH, **options)
    if facts.library == "tensorrt":
        facts = replace(facts, timing_cache=path.parent / "kernels.timing")
    said: list[str] = []

    def progress(step: str, done: int = 0, total: int = 0) -> None:
        said.append(step)

    made = add_engines(Bundle.open(path), precisions, facts, progress)
    unjudged = [step for step in said if step.startswith("no verdict on")]
    if unjudged and facts.library == "tensorrt-rtx":
        pytest.skip(f"TensorRT-RTX does not run here: {unjudged[0]}")
    assert not unjudged
    return made


@pytest.fixture(scope="session", params=["tensorrt", "tensorrt-rtx"])
def gpu_bundle(request, every_bundle, tmp_path_factory) -> tuple[str, Bundle]:
    """A library, and the tiny bundle with an engine of every graph."""
    if reason := missing(f"{request.param}:fp16"):
        pytest.skip(f"{request.param}: {reason}")
    path = tmp_path_factory.mktemp(request.param) / "bundle"
    return request.param, with_plans(every_bundle, path, PRECISIONS, library=request.param)


@pytest.fixture(scope="session")
def expected(tiny_checkpoint) -> dict[str, Expected]:
    """Embeddings of eager float32 for the gate's probes and for BATCHES."""
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    found = {}
    for tower, module in (("image", checkpoint.clip.image), ("text", checkpoint.clip.text)):
        with EagerRunner(module) as eager:
            batches = [*probes(tower, checkpoint.image, checkpoint.text), *BATCHES[tower]]
            found[tower] = expect(eager, batches, None)
    return found


def precision_of(name: str) -> str:
    """Precision of the runner. `fp32` graphs run in TF32."""
    return "tf32" if name == "fp32" else name


@pytest.mark.gpu
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_pass_the_parity_gate(gpu_bundle, expected, tower, precision):
    library, bundle = gpu_bundle
    name = f"{library}:{precision_of(precision)}"
    with open_runner(bundle, tower, name) as runner:
        verdict = judge(runner, expected[tower], tower)
    print(f"{tower} {name}: cosine {verdict.min_cosine:.6f}")
    assert verdict.passed, verdict
    # The verdict recorded when the engine was built agrees.
    (plan,) = bundle.plans(tower, precision, library)
    assert plan.passed(name)


def other_contents(batch: np.ndarray, turn: int) -> np.ndarray:
    """A different batch of the same shape. The embeddings differ by at least 0.15."""
    if batch.dtype == np.uint8:
        return np.roll(batch, 7 * turn, axis=3)
    return np.where(batch < 49406, (batch + 997 * turn) % 49406, batch).astype(np.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_cuda_graph_replay_equals_plain_execution(gpu_bundle, tower, precision):
    """Each shape occurs several times, between others, so that it is run, captured and replayed."""
    library, bundle = gpu_bundle
    order = [*range(len(BATCHES[tower]))] * 5
    random.Random(0).shuffle(order)
    with (
        TensorRtRunner(bundle, tower, RunnerSpec(library, precision), graphs=False) as plain,
        TensorRtRunner(bundle, tower, RunnerSpec(library, precision), graphs=True) as replayed,
    ):
        for turn, number in enumerate(order):
            batch = other_contents(BATCHES[tower][number], turn)
            want, got = plain.run(batch), replayed.run(batch)
            assert got.shape == want.shape == (len(batch), bundle.manifest.embed_dim)
            np.testing.assert_allclose(got, want, atol=0.02)
        shapes = [runner._loaded._shapes for runner in (plain, replayed)]
        assert [any(s.graph is not None for s in every.values()) for every in shapes] == [
            False,
            True,
        ]
        assert all(s.graph is not None for s in shapes[1].values())
        assert max(shape[0] for shape in shapes[1]) == MAX_BATCH


@pytest.mark.gpu
@pytest.mark.parametrize("tower", TOWERS)
def test_evicted_shapes_are_captured_again(gpu_bundle, tower, monkeypatch):
    library, bundle = gpu_bundle
    with TensorRtRunner(bundle, tower, RunnerSpec(library, "fp16")) as runner:
        want = [runner.run(batch) for batch in BATCHES[tower]]
        monkeypatch.setattr("serving.runners.tensor_rt.MOST_SHAPES", 2)
        for _ in range(3):
            for batch, embeddings in zip(BATCHES[tower], want, strict=True):
                for _ in range(3):
                    np.testing.assert_allclose(runner.run(batch), embeddings, atol=0.02)


@pytest.mark.gpu
def test_result_is_not_overwritten_by_the_next_run(gpu_bundle):
    library, bundle = gpu_bundle
    with TensorRtRunner(bundle, "text", RunnerSpec(library, "fp16")) as runner:
        batch = BATCHES["text"][3]
        for _ in range(3):
            first = runner.run(batch)
            kept = first.copy()
            runner.run(batch[::-1])
            assert np.array_equal(first, kept)
    assert np.array_equal(first, kept)


@pytest.mark.gpu
def test_batch_outside_the_profiles_is_rejected(gpu_bundle):
    library, bundle = gpu_bundle
    with TensorRtRunner(bundle, "text", RunnerSpec(library, "fp16")) as runner:
        with pytest.raises(RunnerError, match=r"cannot run int32 \[1, 78\]: the engine accepts"):
            runner.run(np.ones((1, 78), np.int32))
        with pytest.raises(RunnerError, match="expected int32, got int64"):
            runner.run(np.ones((1, 8), np.int64))
        assert runner.run(BATCHES["text"][0]).shape == (1, bundle.manifest.embed_dim)
    with pytest.raises(RunnerError, match="is not open"):
        runner.run(BATCHES["text"][0])


@pytest.mark.gpu
def test_closed_runner_frees_gpu_memory(gpu_bundle):
    from cuda.bindings import runtime as cudart

    library, bundle = gpu_bundle
    free = []
    for _ in range(4):
        with TensorRtRunner(bundle, "image", RunnerSpec(library, "fp16")) as runner:
            for batch in BATCHES["image"]:
                for _ in range(3):
                    runner.run(batch)
        free.append(cudart.cudaMemGetInfo()[1])
    assert free[0] - free[-1] < 32 << 20  # the first runner also loads the library's own code


@pytest.mark.gpu
@pytest.mark.parametrize("fact", ["device", "compute_capability", "version", "onnx_sha256"])
def test_engine_of_another_machine_is_rejected(gpu_bundle, fact):
    library, bundle = gpu_bundle
    if library == "tensorrt-rtx" and fact in ("device", "compute_capability"):
        pytest.skip("plans of TensorRT-RTX belong to no device")
    (plan,) = bundle.plans("image", "fp16", library)
    value = {"compute_capability": "7.0", "version": "1.2.3"}.get(fact, "another")
    edited = replace(plan, engine=replace(plan.engine, **{fact: value}))
    artifacts = tuple(edited if a is plan else a for a in bundle.manifest.artifacts)
    elsewhere = Bundle(bundle.path, replace(bundle.manifest, artifacts=artifacts))
    with pytest.raises(RunnerError) as refused:
        TensorRtRunner(elsewhere, "image", RunnerSpec(library, "fp16")).__enter__()
    said = str(refused.value)
    label = {"compute_capability": "device", "onnx_sha256": "graph"}.get(fact, fact)
    assert f"{plan.file}: {label}: " in said
    assert value in said
    command = f"clip-deploy engine {bundle.path} --engine {library} --precision fp16"
    assert said.endswith(f"Build it here: {command}")


@pytest.mark.gpu
@pytest.mark.skipif(missing("tensorrt:fp16") is not None, reason=str(missing("tensorrt:fp16")))
@pytest.mark.parametrize("option", ["strip_weights", "version_compatible", "hardware_compatible"])
def test_other_build_options_give_equal_embeddings(every_bundle, expected, tmp_path, option):
    whole = with_plans(every_bundle, tmp_path / "whole", ("fp16",))
    made = with_plans(every_bundle, tmp_path / "bundle", ("fp16",), **{option: True})
    for tower in TOWERS:
        with open_runner(made, tower, "tensorrt:fp16") as runner:
            assert judge(runner, expected[tower], tower).passed
    if option == "strip_weights":
        sizes = [b.plans("text", "fp16", "tensorrt")[0].files[0].bytes for b in (made, whole)]
        assert sizes[0] < sizes[1] / 2
