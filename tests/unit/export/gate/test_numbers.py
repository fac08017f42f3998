"""Verdicts, references and ranges with numbers that are not finite."""

import json
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.checkpoints.load import load_checkpoint
from export.gate.datasets import Data, Labelled
from export.gate.parity import Expected, LabelledReference, judge
from export.gate.verify import references
from export.int8.qdq import layers
from export.int8.ranges import activation_ranges
from export.int8.sensitivity import activations, sensitivity
from export.pipeline import Options, build
from export.precisions import Precision
from serving.errors import CheckpointError, ExportError, InputError, RunnerError
from serving.runners.base import LoadedRunner
from serving.runners.spec import RunnerSpec
from serving.util.progress import silent
from serving.util.typed_json import json_text


class Fixed(LoadedRunner):
    """Runner whose embeddings a test gives."""

    spec, runtime_version = RunnerSpec("onnxruntime", "fp32"), "fixed 1"

    def __init__(self, *embeddings):
        self._embeddings = list(embeddings)

    def _load(self):
        return iter(self._embeddings)

    def _infer(self, batch):
        return next(self._loaded)


class Unchecked(Fixed):
    """Runner of another class, whose results nothing has checked."""

    def run(self, batch):
        return self._infer(batch)


BATCH = np.zeros((2, 8), np.int32)
WANT = np.eye(2, dtype=np.float32)


def spoiled(value):
    embeddings = WANT.copy()
    embeddings[1, 0] = value
    return embeddings


@pytest.mark.parametrize("kind", [Fixed, Unchecked])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_verdict_on_embeddings_that_are_not_finite_has_a_reason(kind, value):
    expected = Expected(probes=[(BATCH, WANT), (BATCH, WANT)], labelled=None)
    with kind(WANT, spoiled(value)) as runner:
        found = judge(runner, expected, "text")
    assert not found.passed
    assert "not finite" in found.reason.lower()
    assert found.min_cosine == -1
    json.loads(json_text(found), parse_constant=pytest.fail)


def test_verdict_on_another_shape_has_a_reason():
    with Fixed(np.ones((2, 3), np.float32)) as runner:
        found = judge(runner, Expected(probes=[(BATCH, WANT)], labelled=None), "text")
    assert not found.passed
    assert "[2, 3]" in found.reason


def test_labeled_data_without_embeddings_fail_the_verdict():
    data = Labelled(images=[BATCH], texts=[BATCH], templates=1, truth=np.array([0, 1]))
    labelled = LabelledReference(data=data, images=WANT, labels=WANT)
    with Fixed(WANT, spoiled(math.nan)) as runner:
        found = judge(runner, Expected(probes=[(BATCH, WANT)], labelled=labelled), "image")
    assert found.min_cosine == pytest.approx(1)
    assert not found.passed
    assert "labeled data" in found.reason.lower()
    json_text(found)


def test_passed_verdict_has_no_reason():
    with Fixed(WANT) as runner:
        found = judge(runner, Expected(probes=[(BATCH, WANT)], labelled=None), "text")
    assert found.passed
    assert found.reason is None


def test_runner_returns_no_embedding_that_is_not_finite():
    with Fixed(spoiled(math.nan)) as runner, pytest.raises(RunnerError) as caught:
        runner.run(BATCH)
    assert "1 of 2" in caught.value.reason
    assert caught.value.runner == "onnxruntime:fp32"


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint))


def test_finite_weights_that_overflow_are_refused_before_anything_is_exported(checkpoint, tmp_path):
    with torch.no_grad():
        for block in checkpoint.clip.text.blocks:
            block.mlp.up.weight.mul_(1e30)
            block.mlp.down.weight.mul_(1e30)
    data = Data(calibration={}, source="", labelled=None)
    with pytest.raises(CheckpointError) as caught:
        references(checkpoint, data, silent)
    assert caught.value.name == checkpoint.name
    with pytest.raises(CheckpointError):
        build(checkpoint, tmp_path / "bundle", silent, Options(precisions=[Precision.FP32]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8_FP16])
def test_weight_beyond_float16_is_named_before_anything_is_exported(
    checkpoint, tmp_path, precision
):
    with torch.no_grad():
        checkpoint.clip.text.token_embedding.weight[77, 3] = 7e4
    options = Options(precisions=[Precision.INT8, precision])
    with pytest.raises(InputError) as caught:
        build(checkpoint, tmp_path / "bundle", silent, options)
    assert caught.value.name == f"{checkpoint.name}, text tower, weight token_embedding.weight"
    assert "70000" in caught.value.reason
    assert "--precision fp32 --precision int8" in caught.value.advice
    assert list(tmp_path.iterdir()) == []


def graph(*nodes, size=4):
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size]) for n in "xy")
    weight = numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")
    made = helper.make_graph(list(nodes), "graph", [x], [y], [weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_activation_that_is_not_finite_is_named(method, value):
    model = graph(
        helper.make_node("Mul", ["x", "x"], ["squared"]),
        helper.make_node("MatMul", ["squared", "w"], ["y"], name="product"),
    )
    onnx.checker.check_model(model)
    batches = [np.ones((1, 4), np.float32), np.array([[1, 2, 3, value]], np.float32)]
    with pytest.raises(ExportError) as caught:
        activation_ranges(model, ["squared"], batches, method, lambda: None)
    assert "squared" in caught.value.reason.lower()


def test_cost_of_layers_whose_embeddings_are_not_finite_is_the_worst():
    model = graph(
        helper.make_node("MatMul", ["x", "w"], ["hidden"], name="layer"),
        helper.make_node("MatMul", ["hidden", "w"], ["y"], name="projection"),
    )
    candidates = layers(model)
    assert [layer.name for layer in candidates] == ["layer"]
    ranges = dict.fromkeys(activations(candidates), math.nan)
    (cost,) = sensitivity(model, ranges, [np.ones((1, 4), np.float32)], lambda: None)
    assert cost.cosine_loss == 2.0
