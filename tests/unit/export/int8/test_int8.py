"""INT8: how far activations reach, what becomes of a graph, and what stays in floating point."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import export.pipeline
from export.checkpoints.configs import config_from_openai
from export.checkpoints.load import Checkpoint, load_checkpoint
from export.gate.datasets import probe_images, probes
from export.gate.parity import expect, judge
from export.gate.torch_runners import EagerRunner
from export.graphs.onnx_export import export_onnx
from export.int8.qdq import layers, quantise
from export.int8.quantize import write_dynamic, write_int8
from export.int8.ranges import BINS, PERCENTILE, activation_ranges, runs
from export.int8.sensitivity import activations, fewest, sensitivity
from export.kinds import Kind
from export.pipeline import Options, build
from export.towers.clip import (
    Clip,
    ClipConfig,
    TextConfig,
    VisionTransformerConfig,
    for_inference,
    half_precision,
)
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import TOLERANCES, Artifact, ImageSpec, LayerCost, Quantisation
from serving.errors import BundleError, InputError
from serving.runners.onnx_runtime import session_options
from serving.runners.registry import open_runner
from serving.triton.repository import assemble
from serving.util.machine import cpu_info
from tests.support.references import openai_clip, randomise, some_pixels

METHODS = ("minmax", "percentile", "entropy")


def nothing(*_: object) -> None:
    """Shows no progress."""


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def two_layers(first: np.ndarray, second: np.ndarray) -> onnx.ModelProto:
    """`x` float32 [n, k] -> MatMul -> Relu -> MatMul, the last being the projection."""
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


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    # Columns of very different sizes: one scale for all would be far off.
    first = (rng.normal(size=(24, 16)) * 10.0 ** np.arange(-3, 1, 0.25)).astype(np.float32)
    return two_layers(first, rng.normal(size=(16, 8)).astype(np.float32))


exact_products = pytest.mark.skipif(
    cpu_info()[1].isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"}),
    reason="this CPU has no VNNI: OpenVINO's 8-bit products saturate at 16 bits on it",
)


def run_onnx_runtime(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    options = session_options(1, int8=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def run_openvino(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", hints)
    return np.array(compiled([batch])[0])


# Ranges


@pytest.fixture(scope="module")
def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(n, 24)).astype(np.float32) * s for n, s in ((50, 1), (7, 3), (90, 2))]


def ranges(model, tensors, batches, method):
    return activation_ranges(model, tensors, batches, method, nothing)


def by_hand(model: onnx.ModelProto, batches: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Every magnitude of every tensor, by NumPy."""
    weights = arrays(model)
    x = np.concatenate(batches)
    z = np.maximum(x @ weights["first"], 0)
    return {"x": np.abs(x), "z": np.abs(z), "out": np.abs(z @ weights["second"])}


def test_minmax_is_the_largest_magnitude(small, batches):
    want = by_hand(small, batches)
    got = ranges(small, ["x", "z", "out"], batches, "minmax")
    assert got == {name: pytest.approx(float(want[name].max()), rel=1e-5) for name in want}


def test_minmax_sees_the_negative_side(small, batches):
    batches = [*batches, np.full((1, 24), -50, np.float32)]
    assert ranges(small, ["x"], batches, "minmax") == {"x": 50}


def test_percentile_is_numpys_within_a_bin(small, batches):
    want = by_hand(small, batches)
    got = ranges(small, list(want), batches, "percentile")
    for name, magnitudes in want.items():
        exact = np.percentile(magnitudes, PERCENTILE, method="inverted_cdf")
        assert got[name] == pytest.approx(exact, abs=1.01 * magnitudes.max() / BINS)
        assert got[name] <= magnitudes.max() * (1 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_method_decides_about_a_lone_outlier(small, method):
    """One value in 240,000 at 60 times the spread of the rest."""
    batch = np.random.default_rng(0).normal(size=(10_000, 24)).astype(np.float32)
    batch[17, 3] = -60
    (got,) = ranges(small, ["x"], [batch], method).values()
    if method == "minmax":
        assert got == 60
    else:
        assert 2.5 < got < 7


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_nearly_all_of_a_flat_distribution(small, method):
    batch = np.random.default_rng(0).uniform(-2, 2, (10_000, 24)).astype(np.float32)
    (got,) = ranges(small, ["x"], [batch], method).values()
    assert 1.95 < got <= 2


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_deterministic(small, batches, method):
    tensors = ["x", "z"]
    assert ranges(small, tensors, batches, method) == ranges(small, tensors, batches, method)
    assert list(ranges(small, tensors, iter(batches), method)) == tensors


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_is_always_zero(small, method):
    (got,) = ranges(small, ["x"], [np.zeros((3, 24), np.float32)], method).values()
    assert got == 0


@pytest.mark.parametrize("method", METHODS)
def test_progress_counts_every_run(small, batches, method):
    calls = []
    activation_ranges(small, ["x"], batches, method, lambda: calls.append(1))
    assert len(calls) == runs(method) * len(batches)


# One layer


@pytest.mark.parametrize(
    "run", [run_onnx_runtime, pytest.param(run_openvino, marks=exact_products)]
)
def test_a_quantised_layer_is_the_textbooks(small, batches, run):
    """PyTorch's fake quantisation of one linear layer gives the same numbers."""
    weights, x = arrays(small), np.concatenate(batches)
    reach = 4.0  # of many batches it is less than their maximum: the rest saturates
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
    # -128 is a level of ONNX's int8 and none of the reference's.
    x = np.clip(x, -reach, reach)
    np.testing.assert_allclose(run(model, x), want, atol=1e-4)


def test_the_last_product_is_the_projection_and_stays(small):
    assert [layer.name for layer in layers(small)] == ["first_product"]


@pytest.mark.parametrize("precision", [np.float32, np.float16])
def test_dead_channels_and_dead_activations(precision):
    """A scale of 0, which they would have in half precision, makes NaNs."""
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


# Towers


MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
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
SPEC = ImageSpec(size=32, resize=32, interpolation="bicubic", mean=MEAN, std=STD, pipeline="openai")
PIXELS = [probe_images(SPEC, 8, seed) for seed in range(2)]
FRESH = probe_images(SPEC, 5, 77)


@pytest.fixture(scope="module")
def tower():
    """An image tower in which matrices dominate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Clip(WIDE, MEAN, STD).eval().image


@pytest.fixture(scope="module")
def eager(tower) -> np.ndarray:
    with torch.inference_mode():
        return tower(torch.from_numpy(FRESH)).numpy()


@pytest.fixture(scope="module")
def graphs(tower, tmp_path_factory) -> dict[str, onnx.ModelProto]:
    """fp32 and fp16, and what INT8 makes of both."""
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
    """A floating-point graph and its INT8 twin."""
    return graphs[request.param], graphs[f"int8 over {request.param}"]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The worst of the rows'."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / norms).min())


def test_what_is_quantised_and_what_is_left_alone(pair):
    """The six matrices of each block; neither patches, nor attention products, nor projection."""
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
    # Nothing was added but quantisation, and nothing lost.
    kinds = [n.op_type for n in int8.graph.node]
    rest = [kind for kind in kinds if kind not in ("QuantizeLinear", "DequantizeLinear")]
    assert rest == [n.op_type for n in model.graph.node]


def test_everything_is_symmetric_and_weights_have_a_scale_a_channel(pair):
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
        # Half a step, and what float16 loses of a scale or of a clipped last level.
        slack = 0.5 + (1e-3 if original.dtype == np.float32 else 127 * 2**-10)
        error = np.abs(levels * scales.astype(np.float64) - original)
        assert (error <= slack * scales).all()


def test_no_floating_point_copy_of_a_quantised_weight_is_left(pair):
    model, int8 = pair
    weights = {layer.weight for layer in layers(model)}
    assert not weights & arrays(int8).keys()
    assert arrays(int8).keys() <= {name for node in int8.graph.node for name in node.input}


def test_the_int8_graph_is_small(graphs):
    whole = graphs["fp32"].ByteSize()
    assert graphs["int8 over fp32"].ByteSize() <= 0.3 * whole
    assert graphs["int8 over fp16"].ByteSize() < graphs["int8 over fp32"].ByteSize()


def test_query_key_and_value_share_a_scale(graphs):
    """And not the quantised tensor, which ONNX Runtime would not take."""
    model, int8 = graphs["fp32"], graphs["int8 over fp32"]
    every = layers(model)
    assert len({layer.activation for layer in every[:3]}) == 1
    pairs = [n for n in int8.graph.node if n.op_type == "QuantizeLinear"]
    assert [n.input[0] for n in pairs] == [layer.activation for layer in every]
    assert len({n.output[0] for n in pairs}) == len(every)
    assert len({n.input[1] for n in pairs}) == len(activations(every))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_runtime_computes_every_quantised_layer_in_int8(
    tiny_bundle, tmp_path, monkeypatch, tower
):
    """None in float with weights that each run dequantises, which took two thirds of its time."""
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
def test_the_int8_graph_passes_the_checker_and_runs_alike_everywhere(pair, eager):
    _, int8 = pair
    onnx.checker.check_model(int8, full_check=True)
    one, other = run_onnx_runtime(int8, FRESH), run_openvino(int8, FRESH)
    assert one.dtype == other.dtype == np.float32
    assert cosine(one, other) > 0.999
    assert cosine(one, eager) > 0.99
    assert cosine(other, eager) > 0.99
    assert np.abs(one - eager).max() > 1e-5, "nothing was quantised"
    assert cosine(one, np.roll(eager, 1, axis=0)) < 0.999, "all pictures look alike"


def test_quantising_leaves_the_source_alone_and_is_deterministic(graphs):
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
    # Nobody else reads what `out` reads; key and value still read what `query` reads.
    quantised = {n.input[0] for n in int8.graph.node if n.op_type == "QuantizeLinear"}
    assert out.activation not in quantised
    assert query.activation in quantised
    assert list(nodes[every[1].name].input) == [
        f"{every[1].name}_input_dq",
        f"{every[1].weight}_dq",
    ]
    nothing_left = quantise(model, reach, exclude=[layer.name for layer in every])
    assert nothing_left.graph.node == model.graph.node


def test_a_weight_that_two_layers_share():
    """The exporter makes one initializer of equal tensors, and ONNX Runtime loads no such graph."""
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


def test_a_resnet_in_int8(tmp_path):
    """Convolutions have their channels on axis 0; picture's convolution and projection stay."""
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
            assert weights[node.input[2]].dtype == np.float32  # the bias is left alone
    fresh = some_pixels(3, 64, seed=9)
    want = run_onnx_runtime(graph, fresh)
    assert cosine(run_onnx_runtime(int8, fresh), want) > 0.99
    assert cosine(run_openvino(int8, fresh), want) > 0.99


def test_dynamic_quantisation(graphs, eager, tmp_path):
    source, target = tmp_path / "fp32.onnx", tmp_path / "dynamic.onnx"
    onnx.save(graphs["fp32"], source)
    write_dynamic(source, target)
    made = onnx.load(target)
    assert [n.op_type for n in made.graph.node].count(
        "MatMulInteger"
    ) == 2 * 6 + 1  # the projection too
    assert target.stat().st_size < 0.3 * source.stat().st_size
    got = run_onnx_runtime(made, FRESH)
    assert cosine(got, eager) > 0.98
    assert np.abs(got - eager).max() > 1e-5


# What the gate refuses


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Checkpoint:
    """The tiny one with weights that no other test's draws change: what INT8 costs depends."""
    loaded = load_checkpoint(str(tiny_checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = Clip(loaded.clip.config, loaded.image.mean, loaded.image.std)
    return replace(loaded, clip=randomise(clip, seed=0))


def hostile(checkpoint: Checkpoint, *places: str, factor: float = 200) -> Checkpoint:
    """The same function with outlier channels: a LayerNorm scaled up, its readers down.

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
    """By where the outliers are: the checkpoint, its fp32 graph and its calibration batches."""
    folder, made = tmp_path_factory.mktemp("outliers"), {}
    for places in (("0.up", "1.up"), ("0.qkv",), ("0.up", "0.qkv", "1.up", "1.qkv")):
        bad = hostile(checkpoint, *places)
        made[places] = bad, graph_of(bad, folder / f"{'-'.join(places)}.onnx")
    return made


def calibration(checkpoint: Checkpoint) -> list[np.ndarray]:
    return [probe_images(checkpoint.image, 8, 500 + n) for n in range(4)]


class Gate:
    """The real gate over a graph on disk, through ONNX Runtime; remembers every verdict."""

    def __init__(self, checkpoint: Checkpoint, bundle: Bundle, target: Path) -> None:
        with EagerRunner(checkpoint.clip.image) as eager:
            batches = probes("image", checkpoint.image, checkpoint.text)
            self.expected = expect(eager, batches, None)
        self.bundle, self.target, self.artifacts = bundle, target, []

    def __call__(self, quantisation: Quantisation) -> Artifact:
        artifact = Artifact(
            tower="image",
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
    """Every attempt at INT8, the last being the result."""
    bad, graph = outliers[places]
    gate = Gate(bad, bundle, folder / "image.int8.onnx")
    result = write_int8(graph, gate.target, calibration(bad), "probes", method, gate, nothing)
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


def test_without_outliers_no_layer_is_left_out(checkpoint, tiny_bundle, tmp_path):
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
def test_outliers_of_two_layers_are_found_and_left_out(outliers, tiny_bundle, tmp_path, method):
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


def test_outliers_that_query_key_and_value_share(outliers, tiny_bundle, tmp_path):
    attempts = search(outliers, ("0.qkv",), tiny_bundle, tmp_path)
    graph = outliers[("0.qkv",)][1]
    assert attempts[0].verdicts[0].min_cosine < 0.9
    assert attempts[-1].verdicts[0].passed
    assert attempts[-1].quantisation.excluded == tuple(layer.name for layer in layers(graph)[:3])
    assert len(attempts) == 2, "they read one tensor and leave together"


def test_what_no_exclusion_mends_is_refused_with_its_numbers(outliers, tiny_bundle, tmp_path):
    """Five of nine tensors are hostile; with four of them left alone, INT8 is still wrong."""
    attempts = search(outliers, ("0.up", "0.qkv", "1.up", "1.qkv"), tiny_bundle, tmp_path)
    assert not any(attempt.verdicts[0].passed for attempt in attempts)
    last = attempts[-1]
    table = last.quantisation.sensitivity
    assert len(table) == 9
    assert last.quantisation.excluded == tuple(n for cost in table[:4] for n in cost.layers)
    assert last.files == (describe_file(tmp_path / "image.int8.onnx"),)


def test_the_table_of_a_graph_is_what_the_layers_of_each_tensor_cost_alone(outliers):
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
def test_the_fewest_layers_that_must_go_are_found(units):
    """Whatever number is needed, up to half; with few attempts, each of the dearest layers."""
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


def test_a_single_tensor_has_no_half():
    assert fewest([LayerCost(layers=("only",), cosine_loss=1.0)], lambda _: True) is None


@pytest.fixture(scope="module")
def built(checkpoint, tmp_path_factory) -> Bundle:
    """The bundle of a hostile image tower, INT8 by MinMax, everything real."""
    output = tmp_path_factory.mktemp("hostile") / "bundle"
    options = Options(kinds=(Kind.INT8,), method="minmax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.pipeline, "TOWERS", ("image",))
        return build(hostile(checkpoint, "0.up", "1.up"), output, nothing, options)


def test_a_build_falls_back_and_records_it(built):
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


def test_a_build_reports_what_it_cannot_mend(checkpoint, tmp_path, monkeypatch):
    """Refused in the manifest with its numbers; assembly obeys."""
    monkeypatch.setattr(export.pipeline, "TOWERS", ("image",))
    bad = hostile(checkpoint, "0.up", "0.qkv", "1.up", "1.qkv")
    bundle = build(bad, tmp_path / "bundle", nothing, Options(kinds=(Kind.INT8,), method="minmax"))
    artifact = bundle.artifact("image", "int8")
    assert not artifact.passed("onnxruntime:int8")
    assert min(v.min_cosine for v in artifact.verdicts) < TOLERANCES["int8"].min_cosine
    assert artifact.quantisation.excluded
    assert bundle.artifact("image", "fp32").passed("onnxruntime:fp32")
    with pytest.raises(BundleError, match=r"did not pass the image tower by onnxruntime:int8 "):
        assemble(bundle, tmp_path / "repository", runner="onnxruntime:int8")


def test_a_tower_too_large_for_int8_is_refused_before_the_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export.pipeline, "PROTOBUF_LIMIT", 100_000)
    with pytest.raises(InputError, match=r"image tower of .* GB of weights; .*--precision fp16"):
        build(checkpoint, tmp_path / "bundle", nothing, Options(kinds=(Kind.INT8,)))
    assert not (tmp_path / "bundle").exists()


def test_int8_over_float16(checkpoint, tmp_path, monkeypatch):
    """INT8 products, and all else in half precision: what GPUs want."""
    monkeypatch.setattr(export.pipeline, "TOWERS", ("text",))
    options = Options(kinds=(Kind.INT8_FP16,), method="minmax")
    bundle = build(checkpoint, tmp_path / "bundle", nothing, options)
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
