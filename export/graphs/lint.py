"""Lint rules for CLIP graphs: known export faults that give wrong embeddings without an error.

Each rule covers a fault found in published exports: a LayerNorm decomposed and computed in half
precision; token ids compared as floats (in float16, 49406 and 49407 are the same number); a mask of
infinities that becomes NaN; pixel normalization left to the client; a batch axis fixed at 1.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serving.bundles.manifest import Graph

_BOUNDARY = {
    "image": ("pixels", TensorProto.UINT8, 4, (0,), "image_embeds"),
    "text": ("input_ids", TensorProto.INT32, 2, (0, 1), "text_embeds"),
    "prefix_tree": ("trees", TensorProto.INT32, 3, (0, 2), "text_embeds"),
}
"""For each graph: the name, dtype, rank and dynamic axes of its input, and the output's name."""
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_MIN_OPSET = 17


def lint(path: Path, form: Graph) -> list[str]:
    """Check the ONNX file at `path`.

    Args:
        path: the ONNX file.
        form: the graph that the file has to be.

    Returns:
        One message per problem; empty if there is none.
    """
    # External weights stay on disk, since a protobuf message is limited to 2 GB. The rule on
    # constants reads them from their file.
    model = onnx.load(path, load_external_data=False)
    graph = _Graph(onnx.shape_inference.infer_shapes(model, data_prop=True))
    rules = [
        _boundary(graph, form),
        _layer_norm(graph),
        _constants(graph, path.parent),
        _softmax(graph),
    ]
    pooled_by = {"text": "ReduceMin", "prefix_tree": "NonZero"}.get(form)
    rules.append(_pooling(graph, pooled_by) if pooled_by else _pixels(graph))
    return [f"{path.name}: {problem}" for rule in rules for problem in rule]


class _Graph:
    """ONNX graph with the lookup tables that the rules use."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.producer = {out: node for node in model.graph.node for out in node.output}
        self.types = {
            value.name: value.type.tensor_type.elem_type
            for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
        }
        self.types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        self.constants = {t.name: t for t in model.graph.initializer}

    def of(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type in kinds]


def _boundary(graph: _Graph, kind: str) -> Iterator[str]:
    name, dtype, rank, dynamic, output = _BOUNDARY[kind]
    inputs, outputs = list(graph.graph.input), list(graph.graph.output)
    if [i.name for i in inputs] != [name] or [o.name for o in outputs] != [output]:
        yield (
            f"inputs {[i.name for i in inputs]} and outputs {[o.name for o in outputs]}; expected "
            f"[{name!r}] and [{output!r}]"
        )
        return
    if inputs[0].type.tensor_type.elem_type != dtype:
        yield f"{name} is not {TensorProto.DataType.Name(dtype)}"
    if outputs[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        yield f"{output} is not FLOAT"
    dims = inputs[0].type.tensor_type.shape.dim
    if len(dims) != rank or not all(dims[axis].dim_param for axis in dynamic):
        shape = [dim.dim_param or dim.dim_value for dim in dims]
        axes = " and ".join(map(str, dynamic))
        yield f"{name} has shape {shape}; of {rank} axes {axes} must be dynamic"


def _layer_norm(graph: _Graph) -> Iterator[str]:
    if graph.opset < _MIN_OPSET:
        yield f"opset {graph.opset}; expected at least {_MIN_OPSET}, which has LayerNormalization"
    for node in graph.of("ReduceMean"):
        decomposed = any(
            other.op_type == "Sub" and set(other.input) == {node.input[0], node.output[0]}
            for other in graph.graph.node
        )
        if decomposed:
            yield f"{node.name}: a LayerNorm decomposed into ReduceMean, Sub, ..."
    for node in graph.of("LayerNormalization"):
        if graph.types.get(node.input[0]) not in (None, TensorProto.FLOAT):
            yield f"{node.name}: LayerNorm in half precision"


def _softmax(graph: _Graph) -> Iterator[str]:
    for node in graph.of("Softmax"):
        if graph.types.get(node.input[0]) not in (None, TensorProto.FLOAT):
            yield f"{node.name}: softmax in half precision"


def _constants(graph: _Graph, directory: Path) -> Iterator[str]:
    tensors = list(graph.graph.initializer)
    for node in graph.of("Constant", "ConstantOfShape"):
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            if attribute.name.startswith("value_float"):
                value = numpy_helper.from_array(np.array(value, np.float32))
            if isinstance(value, onnx.TensorProto):
                tensors.append(onnx.TensorProto())
                tensors[-1].CopyFrom(value)
                tensors[-1].name = node.output[0]
    for tensor in tensors:
        if (
            tensor.data_type in _FLOATS
            and not np.isfinite(numpy_helper.to_array(tensor, str(directory))).all()
        ):
            yield f"constant {tensor.name!r} is not finite; a mask must be a large finite number"


def _pooling(graph: _Graph, operator: str) -> Iterator[str]:
    """Check that the token ids stay integers up to the node that finds the end of each text."""
    pooled = graph.of(operator)
    if len(pooled) != 1:
        yield f"{len(pooled)} {operator} nodes; expected one, which finds the end-of-text token"
    waiting = [name for node in pooled for name in node.input]
    while waiting:
        node = graph.producer.get(waiting.pop())
        if node is None:
            continue
        if node.op_type == "Cast" and helper.get_node_attr_value(node, "to") in _FLOATS:
            yield f"{node.name}: token ids are cast to floats before the end-of-text {operator}"
        waiting += node.input


def _pixels(graph: _Graph) -> Iterator[str]:
    """Check that the graph itself casts the uint8 pixels and subtracts a mean per channel."""
    casts = [node for node in graph.of("Cast") if node.input[0] == "pixels"]
    centered = [
        node
        for node in graph.of("Sub")
        if casts and node.input[0] == casts[0].output[0] and _size(graph, node.input[1]) == 3
    ]
    if not centered:
        yield "pixels are not normalized inside the graph (Cast, then Sub of a mean per channel)"


def _size(graph: _Graph, name: str) -> int:
    tensor = graph.constants.get(name)
    return int(np.prod(tensor.dims)) if tensor is not None else 0
