"""The parity gate: correct graphs pass, and each kind of wrong graph fails with its numbers."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import export.gate.verify
import export.pipeline
from export.checkpoints.load import load_checkpoint
from export.gate.datasets import probe_images, probe_texts, probes
from export.gate.parity import expect, judge
from export.gate.torch_runners import EagerRunner
from export.gate.verify import verify
from export.pipeline import Options, build
from export.precisions import Precision
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import TOLERANCES
from serving.errors import BundleError
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec
from serving.util.progress import silent


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Embeddings of the probes by eager float32, by tower."""
    towers = {"image": checkpoint.clip.image, "text": checkpoint.clip.text}

    def of(tower: str):
        with EagerRunner(towers[tower]) as eager:
            return expect(eager, probes(tower, checkpoint.image, checkpoint.text), None)

    return {tower: of(tower) for tower in towers}


def judged(bundle: Bundle, tower: str, expected):
    with open_runner(bundle, tower, "onnxruntime:fp32") as runner:
        return judge(runner, expected[tower], tower)


def change_weights(model: onnx.ModelProto, change) -> None:
    """Apply `change` to the last matrix of the graph, the projection to [.., 32]."""
    names = {i.name: i for i in model.graph.initializer}
    last = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm")][-1]
    (tensor,) = [names[name] for name in last.input if name in names]
    changed = change(onnx.numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed.astype(np.float32), tensor.name))


def cut_output(model: onnx.ModelProto) -> None:
    """Make the graph return all but the last column."""
    name, bounds = model.graph.output[0].name, ("from", "to", "axis")
    for node in model.graph.node:
        node.output[:] = ["whole" if output == name else output for output in node.output]
    for bound, value in zip(bounds, (0, 31, 1), strict=True):
        array = np.array([value], np.int64)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, bound))
    model.graph.node.append(onnx.helper.make_node("Slice", ["whole", *bounds], [name]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 31


def damaged(bundle: Bundle, tmp_path: Path, tower: str, change) -> Bundle:
    """A copy of `bundle` with a damaged `tower` and a manifest that matches it."""
    path = Path(shutil.copytree(bundle.path, tmp_path / "damaged"))
    file = path / f"{tower}.fp32.onnx"
    model = onnx.load(file)
    change(model)
    onnx.save(model, file)
    artifacts = tuple(
        replace(a, files=(describe_file(file),)) if a.file == file.name else a
        for a in bundle.manifest.artifacts
    )
    return Bundle(path, replace(bundle.manifest, artifacts=artifacts))


def measured(bundle: Bundle, source: str | None = None) -> Bundle:
    return verify(bundle, source, None, silent)


def verdict(bundle: Bundle, tower: str):
    verdicts = bundle.artifact(tower, "fp32").verdicts
    return next(v for v in verdicts if v.runner == "onnxruntime:fp32")


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_good_graph_passes(tiny_bundle, tower):
    found = verdict(tiny_bundle, tower)
    assert found.passed
    assert 1 - 1e-5 <= found.min_cosine <= found.mean_cosine <= 1 + 1e-6
    assert 0 < found.max_abs_difference <= 1e-4
    assert found.runtime_version.startswith("onnxruntime 1.")
    assert "CPU" in found.machine
    # Several batch sizes. The text tower gets each of them at every bucket and at the shortest
    # length, and a batch of texts with a shared prefix.
    assert found.embeddings == {"image": 1 + 2 + 5 + 8, "text": 7 * (1 + 3 + 8) + 8}[tower]
    assert tiny_bundle.artifact(tower, "fp32").passed("onnxruntime:fp32")
    assert not tiny_bundle.artifact(tower, "fp32").passed("onnxruntime:fp16")


def test_fp32_tolerances_are_unchanged():
    assert TOLERANCES["fp32"].min_cosine == 0.99999
    assert TOLERANCES["fp32"].max_abs_difference == 1e-4


def test_verdicts_round_trip_through_the_manifest(tiny_bundle):
    again = Bundle.open(tiny_bundle.path)
    assert again.manifest == tiny_bundle.manifest
    assert verdict(again, "text") == verdict(tiny_bundle, "text")


@pytest.mark.parametrize("tower", ["image", "text"])
def test_damaged_graph_fails_with_its_numbers(tiny_bundle, tmp_path, tower, expected):
    rng = np.random.default_rng(0)

    def noisy(weights):
        return weights + 0.1 * weights.std() * rng.normal(size=weights.shape)

    bundle = damaged(tiny_bundle, tmp_path, tower, lambda model: change_weights(model, noisy))
    found = judged(bundle, tower, expected)
    assert not found.passed
    assert 0.9 < found.min_cosine < 0.9999
    assert 1e-3 < found.max_abs_difference < 1


def test_slightly_damaged_graph_fails_by_its_worst_embedding(tiny_bundle, tmp_path, expected):
    """One weight in ten changes by 0.1 percent, which the mean cosine does not show."""

    def change(weights):
        weights.reshape(-1)[::10] *= 1.001
        return weights

    bundle = damaged(tiny_bundle, tmp_path, "image", lambda model: change_weights(model, change))
    found = judged(bundle, "image", expected)
    assert not found.passed
    assert found.mean_cosine > 0.99999


def test_nan_embeddings_fail(tiny_bundle, tmp_path, expected):
    def change(weights):
        weights[0, 0] = np.nan
        return weights

    bundle = damaged(tiny_bundle, tmp_path, "image", lambda model: change_weights(model, change))
    found = judged(bundle, "image", expected)
    assert not found.passed
    assert found.min_cosine == -1
    json.loads(json.dumps(asdict(found)), parse_constant=pytest.fail)


def test_zero_weights_fail(tiny_bundle, tmp_path, expected):
    bundle = damaged(
        tiny_bundle, tmp_path, "text", lambda model: change_weights(model, np.zeros_like)
    )
    found = judged(bundle, "text", expected)
    assert not found.passed
    json.loads(json.dumps(asdict(found)), parse_constant=pytest.fail)


def test_wrong_output_shape_fails(tiny_bundle, tmp_path, expected):
    found = judged(damaged(tiny_bundle, tmp_path, "text", cut_output), "text", expected)
    assert not found.passed
    assert found.min_cosine == -1


def test_failed_verdict_is_recorded_and_does_not_stop_the_build(
    checkpoint, tmp_path, monkeypatch, kept_graphs
):
    def spoil(tower, path, metadata):
        files = kept_graphs(tower, path, metadata)
        if path.name == "text.fp32.onnx":
            model = onnx.load(path)
            change_weights(model, np.negative)
            onnx.save(model, path)
        return files

    monkeypatch.setattr(export.pipeline, "export_onnx", spoil)
    only = [RunnerSpec("onnxruntime", "fp32")]
    monkeypatch.setattr(export.gate.verify, "runners_of", lambda _: only)
    options = Options(precisions=(Precision.FP32,))
    bundle = build(checkpoint, tmp_path / "bundle", silent, options)
    assert verdict(bundle, "image").passed
    assert not verdict(bundle, "text").passed
    assert verdict(bundle, "text").min_cosine < -0.99
    assert Bundle.open(tmp_path / "bundle").manifest == bundle.manifest


def test_verify_measures_again(fp32_bundle):
    manifest = (fp32_bundle.path / "manifest.json").read_bytes()
    again = measured(fp32_bundle)
    assert verdict(again, "image").passed
    assert verdict(again, "text").passed
    assert (fp32_bundle.path / "manifest.json").read_bytes() == manifest


def test_verify_uses_the_tokenizer_of_the_bundle(fp32_bundle, tiny_checkpoint, tmp_path):
    """The checkpoint may have moved, or its vocabulary may have come from an option."""
    moved = Path(shutil.copytree(tiny_checkpoint, tmp_path / "moved"))
    assert verdict(measured(fp32_bundle, str(moved)), "text").passed


def test_verify_rejects_other_weights(fp32_bundle, tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    state["logit_scale"] += 1e-6
    save_file(state, other / "model.safetensors")
    with pytest.raises(BundleError, match=r"bundle was exported from [0-9a-f]{16}.*--checkpoint"):
        measured(fp32_bundle, str(other))


def test_eager_runner_equals_itself(checkpoint):
    batches = list(probes("image", checkpoint.image, checkpoint.text))
    with EagerRunner(checkpoint.clip.image) as eager:
        found = judge(eager, expect(eager, batches, None), "image")
    assert found.runner == "eager:fp32"
    assert found.runtime_version == f"torch {torch.__version__}"
    assert found.max_abs_difference == 0


def test_probe_images_are_deterministic_and_distinct(checkpoint):
    pictures = probe_images(checkpoint.image, 8)
    assert (pictures.shape, pictures.dtype) == ((8, 3, 32, 32), np.uint8)
    assert np.array_equal(pictures, probe_images(checkpoint.image, 8))
    assert not np.array_equal(pictures, probe_images(checkpoint.image, 8, seed=1))
    with EagerRunner(checkpoint.clip.image) as eager:
        cosines = eager.run(pictures) @ eager.run(pictures).T
    assert cosines[~np.eye(8, dtype=bool)].max() < 0.999


@pytest.mark.parametrize("length", [2, 8, 77])
def test_probe_texts_are_valid_token_ids(checkpoint, length):
    spec = checkpoint.text
    ids = probe_texts(spec, 20, length)
    assert (ids.shape, ids.dtype) == ((20, length), np.int32)
    assert (ids[:, 0] == spec.start_id).all()
    first = (ids == spec.end_id).argmax(axis=1)
    assert (first >= 1).all()
    for row, end in zip(ids, first, strict=True):
        assert (row[1:end] < spec.start_id).all()
        assert (row[end + 1 :] == spec.pad_id).all()


def test_bundle_records_the_facts_of_the_checkpoint(tiny_bundle, checkpoint):
    manifest = tiny_bundle.manifest
    assert manifest.name == "tiny-clip"
    assert manifest.embed_dim == 32
    assert manifest.logit_scale == pytest.approx(20)
    assert manifest.image == checkpoint.image
    assert manifest.text == checkpoint.text
    assert manifest.provenance.weights == "trained"
    assert manifest.provenance.source == checkpoint.source
    assert manifest.provenance.weights_sha256 == checkpoint.weights_sha256
    assert manifest.provenance.tools["torch"] == torch.__version__
    assert "ViT 2x64 patch 8 quick_gelu, 32 px; text 2x64" in manifest.architecture
    with open_runner(tiny_bundle, "image", "onnxruntime:fp32") as runner:
        assert runner.run(np.zeros((1, 3, 32, 32), np.uint8)).shape == (1, manifest.embed_dim)
