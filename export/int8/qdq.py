"""Quantization of a floating-point ONNX graph to INT8 with explicit Q/DQ nodes.

Matrix products and convolutions with constant weights are quantized. The activation gets a
QuantizeLinear/DequantizeLinear pair with one scale per tensor; the weight becomes an INT8
initializer followed by a DequantizeLinear with one scale per output channel. Quantization is
symmetric: all zero points are 0. The patch embedding (or ResNet stem), LayerNorm, softmax,
attention products, biases and the final projection stay in floating point. ONNX Runtime, OpenVINO
and TensorRT all fuse this form into INT8 kernels.

Every layer has its own Q/DQ pair, as in graphs of NVIDIA's ModelOpt. This includes query, key and
value, which share an activation and its scale. On x86, ONNX Runtime (1.31) accepts signed
activations only from a QuantizeLinear with one consumer; otherwise it computes in float and
dequantizes the weights in every run.

`export.int8.ranges` measures the ranges; `export.gate.parity` checks the result.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_QUANTIZED = ("MatMul", "Conv")
_MIN_RANGE = 1e-5
"""Lower limit of a range, for channels that are always 0. Its scale is not yet 0 in float16."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Node that can be quantized."""

    name: str
    activation: str
    """Tensor that gets the Q/DQ pair."""
    weight: str
    """Initializer that becomes INT8."""
    channel_axis: int
    """Axis of the weight's output channels, which have one scale each."""


def layers(model: onnx.ModelProto) -> list[Layer]:
    """Return the layers of `model` that can be quantized, in graph order.

    The first convolution and the last product, which projects into the shared embedding space, are
    left out. Both are small, and their errors reach the embedding without being averaged.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    found = [
        Layer(node.name, node.input[0], node.input[1], 1 if node.op_type == "MatMul" else 0)
        for node in model.graph.node
        if node.op_type in _QUANTIZED and node.input[1] in weights
    ]
    stem = next((n.name for n in model.graph.node if n.op_type == "Conv"), None)
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    projection = [node.name for node in products if node.input[1] in weights][-1:]
    return [layer for layer in found if layer.name not in (stem, *projection)]


def quantise(
    model: onnx.ModelProto, ranges: Mapping[str, float], exclude: Collection[str] = ()
) -> onnx.ModelProto:
    """Return a copy of `model` with all layers in INT8, except those in `exclude`.

    Args:
        model: a floating-point graph.
        ranges: for each layer's activation, the magnitude that is mapped to 127.
        exclude: names of layers that stay in floating point.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    chosen = {layer.name: layer for layer in layers(model) if layer.name not in exclude}
    values = {tensor.name: tensor for tensor in out.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    named: set[str] = set()
    for node in out.graph.node:
        layer = chosen.get(node.name)
        if layer is not None:
            # The exporter stores equal weights in one initializer. A second layer that reads it
            # gets a copy under another name; otherwise ONNX Runtime does not load the graph.
            name = f"{layer.weight}_{layer.name}" if layer.weight in named else layer.weight
            named.add(name)
            scale = max(ranges[layer.activation], _MIN_RANGE) / 127
            nodes += _activation_pair(out, layer, scale, values[layer.weight].data_type)
            nodes.append(_weight(out, values[layer.weight], name, layer.channel_axis))
            node.input[0], node.input[1] = f"{layer.name}_input_dq", f"{name}_dq"
        nodes.append(node)
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in out.graph.initializer if tensor.name in used]
    del out.graph.initializer[:]
    out.graph.initializer.extend(kept)
    return out


def _activation_pair(
    model: onnx.ModelProto, layer: Layer, scale: float, scale_type: int
) -> list[onnx.NodeProto]:
    parameters = [f"{layer.activation}_scale", f"{layer.activation}_zero"]
    if parameters[0] not in {tensor.name for tensor in model.graph.initializer}:
        _constant(model, parameters[0], np.array(scale, _numpy(scale_type)))
        _constant(model, parameters[1], np.array(0, np.int8))
    name = f"{layer.name}_input"
    quantized, back = [f"{name}_q"], [f"{name}_dq"]
    inputs = [layer.activation, *parameters]
    return [
        helper.make_node("QuantizeLinear", inputs, quantized, f"{name}_quantize"),
        helper.make_node("DequantizeLinear", [*quantized, *parameters], back, f"{name}_dequantize"),
    ]


def _weight(
    model: onnx.ModelProto, tensor: onnx.TensorProto, name: str, channel_axis: int
) -> onnx.NodeProto:
    values = numpy_helper.to_array(tensor)
    others = tuple(axis for axis in range(values.ndim) if axis != channel_axis)
    scales = np.maximum(np.abs(values.astype(np.float32)).max(axis=others), _MIN_RANGE) / 127
    scales = scales.astype(values.dtype)
    shape = [-1 if axis == channel_axis else 1 for axis in range(values.ndim)]
    levels = np.rint(values.astype(np.float32) / scales.astype(np.float32).reshape(shape))
    _constant(model, f"{name}_int8", np.clip(levels, -127, 127).astype(np.int8))
    _constant(model, f"{name}_scale", scales)
    _constant(model, f"{name}_zero", np.zeros(len(scales), np.int8))
    return helper.make_node(
        "DequantizeLinear",
        [f"{name}_int8", f"{name}_scale", f"{name}_zero"],
        [f"{name}_dq"],
        f"{name}_dequantize",
        axis=channel_axis,
    )


def _constant(model: onnx.ModelProto, name: str, value: NDArray[np.generic]) -> None:
    model.graph.initializer.append(numpy_helper.from_array(value, name))


def _numpy(data_type: int) -> np.dtype[np.generic]:
    return helper.tensor_dtype_to_np_dtype(data_type)
