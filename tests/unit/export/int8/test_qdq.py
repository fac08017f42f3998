"""INT8: the changes to a graph, and equal results in every runtime."""

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import helper

from export.checkpoints.configs import config_from_openai
from export.gate.datasets import probe_images
from export.graphs.onnx_export import export_onnx
from export.int8.qdq import layers, quantise
from export.int8.quantize import write_dynamic
from export.int8.sensitivity import activations
from export.towers.clip import (
    Clip,
    for_inference,
    half_precision,
)
from serving.runners.registry import open_runner
from serving.util.machine import cpu_info
from tests.support.int8_graphs import (
    FRESH,
    MEAN,
    SPEC,
    STD,
    arrays,
    ranges,
    run_onnx_runtime,
    two_layers,
)
from tests.support.references import openai_clip, some_pixels

exact_products = pytest.mark.skipif(
    cpu_info()[1].isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"}),
    reason="this CPU has no VNNI: OpenVINO's 8-bit products saturate at 16 bits on it",
)


def run_openvino(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", hints)
    return np.array(compiled([batch])[0])


@pytest.mark.parametrize(
    "run", [run_onnx_runtime, pytest.param(run_openvino, marks=exact_products)]
)
def test_quantized_layer_equals_fake_quantization(small, batches, run):
    """PyTorch's fake quantization of one linear layer gives the same numbers."""
    weights, x = arrays(small), np.concatenate(batches)
    reach = 4.0  # less than the maximum of many batches, so that the rest saturates
    assert np.abs(x).max() > reach
    fake = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x), reach / 127, 0, -127, 127)
    scales = torch.from_numpy(np.abs(weights["first"]).max(axis=0) / 127)
    zeros = torch.zeros(16, dtype=torch.int32)
    w = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(weights["first"].copy()), scales, zeros, 1, -127, 127
    )
    want = ((fake @ w).relu() @ torch.from_numpy(weights["second"].copy())).numpy()
    model = quantise(small, {"x": reach})
    onnx.checker.check_model(model, full_check=True)
    # ONNX's int8 has the level -128, which the reference does not use.
    x = np.clip(x, -reach, reach)
    np.testing.assert_allclose(run(model, x), want, atol=1e-4)


def test_projection_is_not_quantized(small):
    assert [layer.name for layer in layers(small)] == ["first_product"]


@pytest.mark.parametrize("precision", [np.float32, np.float16])
def test_zero_channels_and_activations_get_nonzero_scales(precision):
    """A scale of 0, which half precision would round to, gives NaN."""
    first = np.random.default_rng(0).normal(size=(24, 16))
    first[:, 3] = 0
    first[:, 5] = 1e-7
    model = two_layers(first.astype(precision), np.eye(16, dtype=precision))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(precision))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    values = arrays(quantise(model, {"x": 0.0}))
    assert (values["first_scale"] > 0).all()
    assert values["x_scale"] > 0
    assert (values["first_int8"][:, 3] == 0).all()
    out = run_onnx_runtime(quantise(model, {"x": 0.0}), np.zeros((2, 24), precision))
    assert np.array_equal(out, np.zeros((2, 16)))


PIXELS = [probe_images(SPEC, 8, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def graphs(tower, tmp_path_factory) -> dict[str, onnx.ModelProto]:
    """The fp32 and fp16 graphs, and the INT8 versions of both."""
    folder, made = tmp_path_factory.mktemp("wide"), {}
    for precision, module in (("fp32", for_inference(tower)), ("fp16", half_precision(tower))):
        path = folder / f"{precision}.onnx"
        export_onnx(module, path, {})
        made[precision] = onnx.load(path)
        reach = ranges(made[precision], activations(layers(made[precision])), PIXELS, "minmax")
        made[f"int8 over {precision}"] = quantise(made[precision], reach)
    return made


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def pair(request, graphs) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A floating-point graph and its INT8 version."""
    return graphs[request.param], graphs[f"int8 over {request.param}"]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The smallest cosine of the rows."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / norms).min())


def test_only_block_matrices_are_quantized(pair):
    """The six matrices of each block are quantized, but not patches, attention products or
    projection."""
    model, int8 = pair
    chosen = {layer.name for layer in layers(model)}
    assert len(chosen) == 2 * 6
    behind = {node.output[0]: node.op_type for node in int8.graph.node}
    for node in int8.graph.node:
        given = {behind.get(name) for name in node.input}
        assert ("DequantizeLinear" in given) == (node.name in chosen), node.name
        if node.op_type in ("Conv", "Gemm"):
            assert node.name not in chosen
    products = [n for n in int8.graph.node if n.op_type == "MatMul" and n.name not in chosen]
    assert len(products) == 2 * 2
    # Only quantization nodes were added, and nothing was removed.
    kinds = [n.op_type for n in int8.graph.node]
    rest = [kind for kind in kinds if kind not in ("QuantizeLinear", "DequantizeLinear")]
    assert rest == [n.op_type for n in model.graph.node]


def test_zero_points_are_zero_and_weights_have_scales_per_channel(pair):
    model, int8 = pair
    values, originals = arrays(int8), arrays(model)
    made = {node.output[0]: node for node in int8.graph.node}
    quantised = {layer.name: layer for layer in layers(model)}
    for node in int8.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = values[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
        if node.name not in quantised:
            continue
        original = originals[quantised[node.name].weight]
        activation, weight = (made[name] for name in node.input)
        assert values[activation.input[1]].shape == ()
        assert values[activation.input[1]].dtype == original.dtype
        levels, scales = values[weight.input[0]], values[weight.input[1]]
        assert (levels.dtype, levels.shape) == (np.int8, original.shape)
        assert (scales.dtype, scales.shape) == (original.dtype, original.shape[1:])
        assert helper.get_node_attr_value(weight, "axis") == 1
        assert levels.min() >= -127
        assert (np.abs(levels.astype(int)).max(axis=0) == 127).all()
        # Half a step, plus float16's rounding of a scale or of a clipped last level.
        slack = 0.5 + (1e-3 if original.dtype == np.float32 else 127 * 2**-10)
        error = np.abs(levels * scales.astype(np.float64) - original)
        assert (error <= slack * scales).all()


def test_no_floating_point_copy_of_a_quantized_weight_remains(pair):
    model, int8 = pair
    weights = {layer.weight for layer in layers(model)}
    assert not weights & arrays(int8).keys()
    assert arrays(int8).keys() <= {name for node in int8.graph.node for name in node.input}


def test_int8_graph_is_at_most_a_third_of_fp32(graphs):
    whole = graphs["fp32"].ByteSize()
    assert graphs["int8 over fp32"].ByteSize() <= 0.3 * whole
    assert graphs["int8 over fp16"].ByteSize() < graphs["int8 over fp32"].ByteSize()


def test_query_key_and_value_share_a_scale(graphs):
    """Each has its own Q/DQ pair, because ONNX Runtime computes in float if they share one."""
    model, int8 = graphs["fp32"], graphs["int8 over fp32"]
    every = layers(model)
    assert len({layer.activation for layer in every[:3]}) == 1
    pairs = [n for n in int8.graph.node if n.op_type == "QuantizeLinear"]
    assert [n.input[0] for n in pairs] == [layer.activation for layer in every]
    assert len({n.output[0] for n in pairs}) == len(every)
    assert len({n.input[1] for n in pairs}) == len(activations(every))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_runtime_computes_every_quantized_layer_in_int8(
    tiny_bundle, tmp_path, monkeypatch, tower
):
    """Layers that ran in float and dequantized their weights took two thirds of a run's time."""
    made = onnxruntime.SessionOptions

    def told():
        options = made()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        return options

    monkeypatch.setattr(onnxruntime, "SessionOptions", told)
    with open_runner(tiny_bundle, tower, "onnxruntime:int8"):
        kinds = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]
    (graph,) = tiny_bundle.artifact(tower, "fp32").files
    quantised = layers(onnx.load(tiny_bundle.path / graph.name))
    assert kinds.count("MatMulIntegerToFloat") == len(quantised) == 12
    assert "DequantizeLinear" not in kinds


@exact_products
def test_int8_graph_passes_the_checker_and_agrees_across_runtimes(pair, eager):
    _, int8 = pair
    onnx.checker.check_model(int8, full_check=True)
    one, other = run_onnx_runtime(int8, FRESH), run_openvino(int8, FRESH)
    assert one.dtype == other.dtype == np.float32
    assert cosine(one, other) > 0.999
    assert cosine(one, eager) > 0.99
    assert cosine(other, eager) > 0.99
    assert np.abs(one - eager).max() > 1e-5, "nothing was quantised"
    assert cosine(one, np.roll(eager, 1, axis=0)) < 0.999, "all pictures look alike"


def test_quantization_keeps_the_source_and_is_deterministic(graphs):
    model = graphs["fp32"]
    before = model.SerializeToString(deterministic=True)
    reach = ranges(model, activations(layers(model)), PIXELS, "minmax")
    one, two = quantise(model, reach), quantise(model, reach)
    assert model.SerializeToString(deterministic=True) == before
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)
    assert one == graphs["int8 over fp32"]


def test_excluded_layers_stay_in_floating_point(graphs):
    model = graphs["fp32"]
    every = layers(model)
    reach = dict.fromkeys(activations(every), 1.0)
    out, query = every[3], every[0]
    int8 = quantise(model, reach, exclude=[out.name, query.name])
    onnx.checker.check_model(int8)
    nodes = {node.name: node for node in int8.graph.node}
    for layer in (out, query):
        assert list(nodes[layer.name].input) == [layer.activation, layer.weight]
        assert np.array_equal(arrays(int8)[layer.weight], arrays(model)[layer.weight])
    # Only this layer reads its input, while key and value still read the input of query.
    quantised = {n.input[0] for n in int8.graph.node if n.op_type == "QuantizeLinear"}
    assert out.activation not in quantised
    assert query.activation in quantised
    assert list(nodes[every[1].name].input) == [
        f"{every[1].name}_input_dq",
        f"{every[1].weight}_dq",
    ]
    nothing_left = quantise(model, reach, exclude=[layer.name for layer in every])
    assert nothing_left.graph.node == model.graph.node


def test_weight_shared_by_two_layers_is_quantized():
    """The exporter merges equal tensors into one initializer. It must be copied under another name,
    or ONNX Runtime does not load the graph."""
    square = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    model = two_layers(square, square)
    model.graph.node[2].input[1] = "first"
    model.graph.node.append(helper.make_node("MatMul", ["out", "second"], ["end"], "projection2"))
    model.graph.output[0].name = "end"
    assert len(layers(model)) == 2
    x = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
    reach = ranges(model, ["x", "z"], [x], "minmax")
    both = quantise(model, reach)
    onnx.checker.check_model(both, full_check=True)
    assert cosine(run_onnx_runtime(both, x), run_onnx_runtime(model, x)) > 0.999
    assert [n.op_type for n in both.graph.node].count("DequantizeLinear") == 2 + 2
    one = quantise(model, reach, exclude=["first_product"])
    assert {"first", "first_int8"} <= arrays(one).keys()
    assert cosine(run_onnx_runtime(one, x), run_onnx_runtime(model, x)) > 0.999


def test_resnet_is_quantized(tmp_path):
    """Convolutions have their channels on axis 0. The first convolution and the projection are
    kept."""
    model = openai_clip("resnet")
    clip = Clip(config_from_openai(model.state_dict(), "quick_gelu"), MEAN, STD)
    from export.checkpoints.weight_names import load_state

    load_state(clip, model.state_dict(), "openai")
    path = tmp_path / "resnet.onnx"
    export_onnx(for_inference(clip.eval().image), path, {})
    graph = onnx.load(path)
    names = {layer.name for layer in layers(graph)}
    convolutions = [n for n in graph.graph.node if n.op_type == "Conv"]
    assert [n.name in names for n in convolutions] == [False] + [True] * (len(convolutions) - 1)
    weights = arrays(graph)
    products = [n for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert [n.name in names for n in products] == [True, True, True, False]
    batches = [some_pixels(4, 64, seed) for seed in range(2)]
    int8 = quantise(graph, ranges(graph, activations(layers(graph)), batches, "minmax"))
    onnx.checker.check_model(int8, full_check=True)
    levels = arrays(int8)
    made = {node.output[0]: node for node in int8.graph.node}
    for node in int8.graph.node:
        if node.op_type == "Conv" and node.name in names:
            weight = made[node.input[1]]
            assert helper.get_node_attr_value(weight, "axis") == 0
            assert (np.abs(levels[weight.input[0]].astype(int)).max(axis=(1, 2, 3)) == 127).all()
            assert weights[node.input[2]].dtype == np.float32  # the bias is unchanged
    fresh = some_pixels(3, 64, seed=9)
    want = run_onnx_runtime(graph, fresh)
    assert cosine(run_onnx_runtime(int8, fresh), want) > 0.99
    assert cosine(run_openvino(int8, fresh), want) > 0.99


def test_dynamic_quantization_quantizes_all_matrices(graphs, eager, tmp_path):
    source, target = tmp_path / "fp32.onnx", tmp_path / "dynamic.onnx"
    onnx.save(graphs["fp32"], source)
    write_dynamic(source, target)
    made = onnx.load(target)
    assert [n.op_type for n in made.graph.node].count(
        "MatMulInteger"
    ) == 2 * 6 + 1  # including the projection
    assert target.stat().st_size < 0.3 * source.stat().st_size
    got = run_onnx_runtime(made, FRESH)
    assert cosine(got, eager) > 0.98
    assert np.abs(got - eager).max() > 1e-5
