"""Small graphs, and functions that run them."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from export.gate.datasets import probe_images
from export.int8.ranges import activation_ranges
from export.towers.clip import (
    ClipConfig,
    TextConfig,
    VisionTransformerConfig,
)
from serving.bundles.manifest import ImageSpec
from serving.runners.onnx_runtime import session_options

METHODS = ("minmax", "percentile", "entropy")


def nothing(*_: object) -> None:
    """A progress callback that shows nothing."""


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def two_layers(first: np.ndarray, second: np.ndarray) -> onnx.ModelProto:
    """`x` float32 [n, k] -> MatMul -> Relu -> MatMul, where the last MatMul is the projection."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["y"], "first_product"),
            helper.make_node("Relu", ["y"], ["z"], "relu"),
            helper.make_node("MatMul", ["z", "second"], ["out"], "projection"),
        ],
        "two layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", first.shape[0]])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", second.shape[1]])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run_onnx_runtime(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    options = session_options(1, int8=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def ranges(model, tensors, batches, method):
    return activation_ranges(model, tensors, batches, method, nothing)


WIDE = ClipConfig(
    embed_dim=64,
    image=VisionTransformerConfig(
        width=256,
        layers=2,
        heads=4,
        mlp_width=1024,
        activation="quick_gelu",
        image_size=32,
        patch_size=8,
    ),
    text=TextConfig(
        width=64,
        layers=1,
        heads=1,
        mlp_width=64,
        activation="gelu",
        context_length=8,
        vocab_size=10,
        end_id=9,
    ),
)


MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

SPEC = ImageSpec(size=32, resize=32, interpolation="bicubic", mean=MEAN, std=STD, pipeline="openai")


FRESH = probe_images(SPEC, 5, 77)
