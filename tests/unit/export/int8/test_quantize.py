"""INT8 that fails the parity gate: the layers that stay in floating point."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import export.pipeline
from export.checkpoints.load import Checkpoint, load_checkpoint
from export.gate.datasets import probe_images, probes
from export.gate.parity import expect, judge
from export.gate.torch_runners import EagerRunner
from export.graphs.onnx_export import export_onnx
from export.int8.qdq import layers, quantise
from export.int8.quantize import write_int8
from export.int8.sensitivity import activations, fewest, sensitivity
from export.pipeline import Options, build
from export.precisions import Precision
from export.towers.clip import (
    Clip,
    for_inference,
)
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import TOLERANCES, Artifact, LayerCost, Quantisation
from serving.errors import BundleError, InputError
from serving.runners.registry import open_runner
from serving.triton.repository import assemble
from serving.util.progress import silent
from tests.support.int8_graphs import (
    METHODS,
    ranges,
    run_onnx_runtime,
)
from tests.support.references import randomise


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Checkpoint:
    """A tiny checkpoint with fixed weights, independent of other tests, because the loss of INT8
    depends on them."""
    loaded = load_checkpoint(str(tiny_checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = Clip(loaded.clip.config, loaded.image.mean, loaded.image.std)
    return replace(loaded, clip=randomise(clip, seed=0))


def hostile(checkpoint: Checkpoint, *places: str, factor: float = 200) -> Checkpoint:
    """The same function with outlier channels: a LayerNorm is scaled up, its readers down.

    Args:
        places: `<block>.up` or `<block>.qkv`, of the image tower.
    """
    clip = copy.deepcopy(checkpoint.clip)
    for place in places:
        number, _, what = place.partition(".")
        block = clip.image.encoder.blocks[int(number)]
        attention = block.attention
        norm, readers = (
            (block.norm2, [block.mlp.up])
            if what == "up"
            else (block.norm1, [attention.query, attention.key, attention.value])
        )
        channels = [3, 13, 40]
        with torch.no_grad():
            norm.weight[channels] *= factor
            norm.bias[channels] *= factor
            for linear in readers:
                linear.weight[:, channels] /= factor
    return replace(checkpoint, clip=clip, name="hostile")


def graph_of(checkpoint: Checkpoint, path: Path) -> onnx.ModelProto:
    export_onnx(for_inference(checkpoint.clip.image), path, {})
    return onnx.load(path)


@pytest.fixture(scope="module")
def outliers(checkpoint, tmp_path_factory):
    """By position of the outliers: the checkpoint, its fp32 graph and its calibration batches."""
    folder, made = tmp_path_factory.mktemp("outliers"), {}
    for places in (("0.up", "1.up"), ("0.qkv",), ("0.up", "0.qkv", "1.up", "1.qkv")):
        bad = hostile(checkpoint, *places)
        made[places] = bad, graph_of(bad, folder / f"{'-'.join(places)}.onnx")
    return made


def calibration(checkpoint: Checkpoint) -> list[np.ndarray]:
    return [probe_images(checkpoint.image, 8, 500 + n) for n in range(4)]


class Gate:
    """The real gate over a graph on disk, through ONNX Runtime. Records every verdict."""

    def __init__(self, checkpoint: Checkpoint, bundle: Bundle, target: Path) -> None:
        with EagerRunner(checkpoint.clip.image) as eager:
            batches = probes("image", checkpoint.image, checkpoint.text)
            self.expected = expect(eager, batches, None)
        self.bundle, self.target, self.artifacts = bundle, target, []

    def __call__(self, quantisation: Quantisation) -> Artifact:
        artifact = Artifact(
            graph="image",
            kind="onnx",
            precision="int8",
            files=(describe_file(self.target),),
            quantisation=quantisation,
        )
        manifest = replace(self.bundle.manifest, artifacts=(artifact,))
        with open_runner(
            Bundle(self.target.parent, manifest), "image", "onnxruntime:int8"
        ) as runner:
            verdict = judge(runner, self.expected, "image")
        self.artifacts.append(replace(artifact, verdicts=(verdict,)))
        return self.artifacts[-1]


def search(outliers, places, bundle, folder, method="minmax") -> list[Artifact]:
    """All attempts at INT8. The last one is the result."""
    bad, graph = outliers[places]
    gate = Gate(bad, bundle, folder / "image.int8.onnx")
    result = write_int8(graph, gate.target, calibration(bad), "probes", method, gate, silent)
    assert result == gate.artifacts[-1]
    return gate.artifacts


def test_outliers_do_not_change_fp32(checkpoint, outliers):
    batch = probe_images(checkpoint.image, 8, 9)
    with torch.inference_mode():
        want = checkpoint.clip.image(torch.from_numpy(batch)).numpy()
        for bad, graph in outliers.values():
            np.testing.assert_allclose(
                bad.clip.image(torch.from_numpy(batch)).numpy(), want, atol=1e-5
            )
            np.testing.assert_allclose(run_onnx_runtime(graph, batch), want, atol=1e-5)


def test_no_layer_is_excluded_without_outliers(checkpoint, tiny_bundle, tmp_path):
    graph = graph_of(checkpoint, tmp_path / "fp32.onnx")
    (tmp_path / "out").mkdir()
    attempts = search(
        {"none": (checkpoint, graph)}, "none", tiny_bundle, tmp_path / "out", "percentile"
    )
    (only,) = attempts
    assert only.verdicts[0].passed
    assert only.quantisation.excluded == only.quantisation.sensitivity == ()
    assert only.quantisation.layers == 12


@pytest.mark.parametrize("method", METHODS)
def test_layers_with_outliers_are_excluded(outliers, tiny_bundle, tmp_path, method):
    places = ("0.up", "1.up")
    attempts = search(outliers, places, tiny_bundle, tmp_path, method)
    cosines = [attempt.verdicts[0].min_cosine for attempt in attempts]
    tolerance = TOLERANCES["int8"].min_cosine
    assert cosines[0] < tolerance - 0.01, "naive INT8 passes: the checkpoint is not hostile"
    assert cosines[-1] > 0.999
    found = attempts[-1].quantisation
    graph = outliers[places][1]
    ups = {layers(graph)[4].name, layers(graph)[10].name}
    assert set(found.excluded) == ups
    assert [len(a.quantisation.excluded) for a in attempts] == [0, 1, 2]
    table = found.sensitivity
    assert sorted(n for cost in table for n in cost.layers) == sorted(x.name for x in layers(graph))
    losses = [cost.cosine_loss for cost in table]
    assert losses == sorted(losses, reverse=True)
    assert {cost.layers for cost in table[:2]} == {(name,) for name in ups}
    assert losses[1] > 50 * losses[2] >= 0
    assert found.excluded == tuple(name for cost in table[:2] for name in cost.layers)


def test_query_key_and_value_are_excluded_together(outliers, tiny_bundle, tmp_path):
    attempts = search(outliers, ("0.qkv",), tiny_bundle, tmp_path)
    graph = outliers[("0.qkv",)][1]
    assert attempts[0].verdicts[0].min_cosine < 0.9
    assert attempts[-1].verdicts[0].passed
    assert attempts[-1].quantisation.excluded == tuple(layer.name for layer in layers(graph)[:3])
    assert len(attempts) == 2, "they read one tensor and leave together"


def test_graph_that_exclusion_cannot_repair_fails_with_its_numbers(outliers, tiny_bundle, tmp_path):
    """Five of nine tensors have outliers. INT8 still fails when four of them are excluded."""
    attempts = search(outliers, ("0.up", "0.qkv", "1.up", "1.qkv"), tiny_bundle, tmp_path)
    assert not any(attempt.verdicts[0].passed for attempt in attempts)
    last = attempts[-1]
    table = last.quantisation.sensitivity
    assert len(table) == 9
    assert last.quantisation.excluded == tuple(n for cost in table[:4] for n in cost.layers)
    assert last.files == (describe_file(tmp_path / "image.int8.onnx"),)


def test_sensitivity_is_measured_for_each_tensor_alone(outliers):
    bad, graph = outliers[("0.up", "1.up")]
    batches = calibration(bad)[:2]
    every = layers(graph)
    reach = ranges(graph, activations(every), batches, "minmax")
    calls = []
    table = sensitivity(graph, reach, batches, lambda: calls.append(1))
    assert len(calls) == len(table) == len(activations(every))
    for cost in (table[0], table[-1]):
        others = [layer.name for layer in every if layer.name not in cost.layers]
        alone = quantise(graph, reach, others)
        cosines = [
            (run_onnx_runtime(alone, b) * run_onnx_runtime(graph, b)).sum(axis=1) for b in batches
        ]
        loss = 1 - float(np.concatenate(cosines).mean())
        assert cost.cosine_loss == pytest.approx(max(loss, 0), abs=1e-6)


@pytest.mark.parametrize("units", [2, 3, 9, 48, 72])
def test_smallest_sufficient_exclusion_is_found(units):
    """The search finds any number of layers up to half, with few attempts and the most costly
    first."""
    costs = [LayerCost(layers=(f"k{n}", f"v{n}"), cosine_loss=1 / (n + 1)) for n in range(units)]
    names = [name for cost in costs for name in cost.layers]
    for needed in range(1, units + 1):
        tried = []

        def passes(excluded, needed=needed, tried=tried):
            assert excluded == tuple(names[: len(excluded)])
            assert excluded not in tried
            tried.append(excluded)
            return len(excluded) >= 2 * needed

        found = fewest(costs, passes)
        if needed <= units // 2:
            assert found == tuple(names[: 2 * needed])
        else:
            assert found is None
            assert len(tried[-1]) == units // 2 * 2, "half of them was not tried"
        assert len(tried) <= 2 * np.log2(units) + 1


def test_single_tensor_is_not_excluded():
    assert fewest([LayerCost(layers=("only",), cosine_loss=1.0)], lambda _: True) is None


@pytest.fixture(scope="module")
def built(checkpoint, tmp_path_factory) -> Bundle:
    """A real build of an image tower with outliers, INT8 by MinMax."""
    output = tmp_path_factory.mktemp("hostile") / "bundle"
    options = Options(precisions=(Precision.INT8,), method="minmax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.pipeline, "TOWERS", ("image",))
        return build(hostile(checkpoint, "0.up", "1.up"), output, silent, options)


def test_build_excludes_layers_and_records_them(built):
    artifact = Bundle.open(built.path).artifact("image", "int8")
    found = artifact.quantisation
    assert found.method == "minmax"
    assert found.layers == 12
    assert len(found.excluded) == 2
    assert found.excluded == tuple(n for cost in found.sensitivity[:2] for n in cost.layers)
    assert {v.runner for v in artifact.verdicts} == {"onnxruntime:int8", "openvino:int8"}
    assert all(v.passed for v in artifact.verdicts)
    kept = {n.name: n for n in onnx.load(built.path / artifact.file).graph.node}
    assert all(not kept[name].input[1].endswith("_dq") for name in found.excluded)


def test_build_records_a_failed_verdict(checkpoint, tmp_path, monkeypatch):
    """The manifest has the failed verdict with its numbers, and assembly rejects the artifact."""
    monkeypatch.setattr(export.pipeline, "TOWERS", ("image",))
    bad = hostile(checkpoint, "0.up", "0.qkv", "1.up", "1.qkv")
    options = Options(precisions=(Precision.INT8,), method="minmax")
    bundle = build(bad, tmp_path / "bundle", silent, options)
    artifact = bundle.artifact("image", "int8")
    assert not artifact.passed("onnxruntime:int8")
    assert min(v.min_cosine for v in artifact.verdicts) < TOLERANCES["int8"].min_cosine
    assert artifact.quantisation.excluded
    assert bundle.artifact("image", "fp32").passed("onnxruntime:fp32")
    with pytest.raises(BundleError, match=r"the image tower by onnxruntime:int8 did not pass"):
        assemble(bundle, tmp_path / "repository", runner="onnxruntime:int8")


def test_tower_too_large_for_int8_is_rejected_before_the_build(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export.pipeline, "PROTOBUF_LIMIT", 100_000)
    with pytest.raises(InputError, match=r"image tower of .* GB of weights.*--precision fp16"):
        build(checkpoint, tmp_path / "bundle", silent, Options(precisions=(Precision.INT8,)))
    assert not (tmp_path / "bundle").exists()


def test_int8_fp16_graph_is_built(checkpoint, tmp_path, monkeypatch):
    """INT8 products with everything else in half precision, which suits GPUs."""
    monkeypatch.setattr(export.pipeline, "TOWERS", ("text",))
    options = Options(precisions=(Precision.INT8_FP16,), method="minmax")
    bundle = build(checkpoint, tmp_path / "bundle", silent, options)
    artifact = bundle.artifact("text", "int8-fp16")
    assert [v.runner for v in artifact.verdicts] == ["onnxruntime:int8-fp16"]
    assert artifact.passed("onnxruntime:int8-fp16")
    assert artifact.quantisation.layers == 12
    graph = onnx.load(bundle.path / artifact.file).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    quantised = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert {kinds[n.input[1]] for n in quantised} == {onnx.TensorProto.FLOAT16}
    half = bundle.artifact("text", "fp16").files[0].bytes
    assert artifact.files[0].bytes < half
