"""Engines built by TensorRT-RTX, which needs no GPU, and graphs that cannot be built."""

import os
import shutil
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from export.checkpoints.load import load_checkpoint
from export.engines.builder import profiles_of
from export.engines.bundle_engines import add_engines
from export.graphs.onnx_export import export_onnx
from export.towers.clip import for_inference, half_precision
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.engine_facts import Engine
from serving.bundles.manifest import TOWERS
from serving.errors import ExportError
from serving.runners.tensor_rt import collecting
from serving.util.files import sha256_of
from serving.util.progress import silent
from tests.support.engine_builds import (
    OPTIONS,
    PRECISIONS,
    SLOWEST_S,
    Graph,
    built,
    graph_of,
    write_int8,
)

BOUNDARY = {
    "image": ("pixels", "UINT8", "image_embeds"),
    "text": ("input_ids", "INT32", "text_embeds"),
}

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="no TensorRT-RTX: make setup")


def diagnostics(plan: bytes) -> int:
    """Return the runtime's objections to an engine, except that there is no GPU."""
    runtime = rtx.Runtime(collecting(rtx, deque()))
    return runtime.get_engine_validity(plan)[1]


def assert_sound(graph: Graph, plan: bytes, engine: Engine) -> None:
    faults = rtx.EngineInvalidityDiagnostics
    assert not diagnostics(plan) & int(faults.MALFORMED_ENGINE)
    assert not diagnostics(plan) & int(faults.VERSION_MISMATCH)
    name, _, output = BOUNDARY[graph.tower]
    assert name.encode() in plan
    assert output.encode() in plan
    assert (engine.library, engine.version) == ("tensorrt-rtx", rtx.__version__)
    assert (engine.device, engine.compute_capability) == (None, None)
    assert engine.onnx_sha256 == sha256_of(graph.path)
    assert engine.profiles == profiles_of(graph.tower, graph.manifest, 64)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiny_engines_are_built(every_bundle, tower, precision):
    graph = graph_of(every_bundle, tower, precision)
    plan, engine = built(graph)
    assert_sound(graph, plan, engine)
    assert engine.build_seconds < SLOWEST_S


def test_diagnostics_detect_an_invalid_engine():
    """Shows that `assert_sound` can fail."""
    assert diagnostics(b"no plan" * 100) & int(rtx.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


LARGE = [("image", "fp16"), ("image", "int8"), ("text", "fp16"), ("text", "int8-fp16")]
"""INT8 combined with either precision. Each further graph costs ten seconds of export."""


@pytest.fixture(scope="session")
def large(tmp_path_factory, tiny_bundle, vocabulary) -> dict[tuple[str, str], Graph]:
    """Graphs of the size of ViT-B/32 with random weights."""
    checkpoint = load_checkpoint("random:ViT-B-32", vocabulary=vocabulary)
    folder = tmp_path_factory.mktemp("large")
    manifest = replace(tiny_bundle.manifest, image=checkpoint.image, text=checkpoint.text)
    files = {(t, p): folder / f"{t}.{p}.onnx" for t, p in [*LARGE, ("image", "fp32")]}
    export_onnx(for_inference(checkpoint.clip.image), files["image", "fp32"], {})
    export_onnx(half_precision(checkpoint.clip.image), files["image", "fp16"], {})
    export_onnx(half_precision(checkpoint.clip.text), files["text", "fp16"], {})
    write_int8(files["image", "fp32"], files["image", "int8"], manifest)
    write_int8(files["text", "fp16"], files["text", "int8-fp16"], manifest)
    return {(t, p): Graph(file, t, manifest) for (t, p), file in files.items()}


@pytest.mark.skipif(
    "CLIP_SOAK" not in os.environ, reason="takes a minute and a half; make soak builds them"
)
@pytest.mark.parametrize(("tower", "precision"), LARGE)
def test_vit_b_32_engines_are_built(large, tower, precision):
    graph = large[tower, precision]
    plan, engine = built(graph)
    assert_sound(graph, plan, engine)
    megabytes = len(plan) / 1e6
    print(f"ViT-B/32 {tower} {precision}: {megabytes:.0f} MB in {engine.build_seconds} s")
    assert engine.build_seconds < SLOWEST_S
    # Weights keep the type that they have in the graph, and are not converted to float32.
    assert megabytes < 1.3 * graph.path.stat().st_size / 1e6


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_parsed_network_has_the_expected_inputs_and_outputs(every_bundle, tower, precision):
    """For every precision: uint8 or int32 input, float32 output, dynamic batch and length."""
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    typed = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = rtx.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph_of(every_bundle, tower, precision).path))
    assert (network.num_inputs, network.num_outputs) == (1, 1)
    given, made = network.get_input(0), network.get_output(0)
    name, dtype, output = BOUNDARY[tower]
    assert (given.name, given.dtype) == (name, getattr(rtx.DataType, dtype))
    assert tuple(given.shape) == ((-1, 3, 32, 32) if tower == "image" else (-1, -1))
    assert (made.name, made.dtype) == (output, rtx.DataType.FLOAT)
    assert tuple(made.shape) == (-1, every_bundle.manifest.embed_dim)


@pytest.fixture
def seen(monkeypatch) -> dict[str, Any]:
    """Record the settings that the library holds when it starts to build."""
    seen: dict[str, Any] = {"profiles": []}

    class Builder(rtx.Builder):
        def create_optimization_profile(self):
            seen["profiles"].append(super().create_optimization_profile())
            return seen["profiles"][-1]

        def build_serialized_network(self, network, config):
            seen["typed"] = network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            seen["flags"] = {
                name for name, flag in rtx.BuilderFlag.__members__.items() if config.get_flag(flag)
            }
            seen["workspace"] = config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE)
            seen["level"] = config.builder_optimization_level
            seen["verbosity"] = config.profiling_verbosity
            seen["taken"] = config.num_optimization_profiles
            return super().build_serialized_network(network, config)

    library = SimpleNamespace(**vars(rtx) | {"Builder": Builder})
    monkeypatch.setattr("export.engines.builder.load_library", lambda _: library)
    return seen


@pytest.mark.parametrize(("tower", "max_batch"), [("image", 64), ("text", 64), ("text", 4)])
def test_build_options_reach_the_library(every_bundle, seen, tower, max_batch):
    options = replace(OPTIONS, max_batch=max_batch, workspace_bytes=1 << 30, optimization_level=2)
    _, engine = built(graph_of(every_bundle, tower, "fp16"), options)
    name = BOUNDARY[tower][0]
    shapes = [tuple(map(tuple, profile.get_shape(name))) for profile in seen["profiles"]]
    assert shapes == [(p.minimum, p.optimum, p.maximum) for p in engine.profiles]
    assert seen["taken"] == len(shapes) == (1 if tower == "image" else 2)
    assert shapes[-1][-1][0] == max_batch
    assert seen["typed"]
    assert "TF32" in seen["flags"]
    assert not seen["flags"] & {"FP16", "INT8", "BF16", "STRIP_PLAN", "VERSION_COMPATIBLE"}
    assert (seen["workspace"], seen["level"]) == (1 << 30, 2)
    assert seen["verbosity"] == rtx.ProfilingVerbosity.DETAILED


def unknown_operator(model: onnx.ModelProto) -> str:
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type = "Nonsense"
    return node.name


def other_width(model: onnx.ModelProto) -> str:
    """Remove some rows of a weight."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights)
    weight = weights[node.input[1]]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:-3], weight.name))
    return node.name


def mixed_types(model: onnx.ModelProto) -> str:
    """Combine float16 and float32, which a strongly typed network does not convert."""
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    product = next(n for n in reversed(model.graph.node) if n.op_type == "MatMul")
    cast = onnx.helper.make_node("Cast", [product.input[0]], ["mixed"], "mixed_cast", to=full)
    product.input[0] = "mixed"
    model.graph.node.insert(list(model.graph.node).index(product), cast)
    assert half in {tensor.data_type for tensor in model.graph.initializer}
    return product.name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unknown_operator, "(Nonsense): "),
        (other_width, "must match"),
        (mixed_types, "must have same input types"),
    ],
)
def test_unparsable_node_is_rejected(tiny_bundle, tmp_path, change, reason):
    graph = graph_of(tiny_bundle, "image", "fp16")
    model = onnx.load(graph.path)
    name = change(model)
    assert name
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ExportError) as refused:
        built(graph._replace(path=tmp_path / "broken.onnx"))
    said = str(refused.value)
    assert said.startswith(f"tensorrt-rtx {rtx.__version__} cannot parse {tmp_path}/broken.onnx: ")
    assert f"node {name} (" in said
    assert reason in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda graph: b"hello", "it contains no graph"),
        (lambda graph: b"", "it contains no graph"),
        (lambda graph: graph[: len(graph) // 2], "Failed to parse the ONNX model"),
        (None, "Input file cannot be found"),
    ],
    ids=["another file", "empty", "cut off", "not there"],
)
def test_file_that_is_not_a_graph_is_rejected(tiny_bundle, tmp_path, content, reason):
    graph = graph_of(tiny_bundle, "image", "fp16")
    path = tmp_path / "broken.onnx"
    if content:
        path.write_bytes(content(graph.path.read_bytes()))
    with pytest.raises(ExportError, match=f"cannot parse {path}: .*{reason}"):
        built(graph._replace(path=path))


def test_graph_with_another_input_is_rejected(tiny_bundle):
    graph = graph_of(tiny_bundle, "image", "fp16")._replace(tower="text")
    with pytest.raises(
        ExportError, match=r"cannot build .*image\.fp16\.onnx: .* input tensor pixels is missing"
    ):
        built(graph)


def test_too_small_workspace_is_rejected(tiny_bundle):
    with pytest.raises(ExportError, match=r"cannot build .* workspace limit"):
        built(graph_of(tiny_bundle, "text", "fp16"), replace(OPTIONS, workspace_bytes=1 << 10))


def test_failed_build_leaves_nothing_in_the_bundle(tiny_bundle, tmp_path):
    """The manifest matches the broken graph, as if the export had produced it."""
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, path, copy_function=os.link)
    model = onnx.load(path / "image.fp16.onnx")
    unknown_operator(model)
    for name in ("image.fp16.onnx", "manifest.json"):
        (path / name).unlink()
    onnx.save(model, path / "image.fp16.onnx")
    files = (describe_file(path / "image.fp16.onnx"),)
    artifacts = tuple(
        replace(a, files=files) if a.file == "image.fp16.onnx" else a
        for a in tiny_bundle.manifest.artifacts
    )
    text = replace(tiny_bundle.manifest, artifacts=artifacts).to_json()
    (path / "manifest.json").write_text(text)
    before = sorted(path.rglob("*"))
    with pytest.raises(ExportError, match=r"cannot parse .*image\.fp16\.onnx: node "):
        add_engines(Bundle.open(path), ["fp16"], OPTIONS, silent)
    assert sorted(path.rglob("*")) == before
    assert (path / "manifest.json").read_text() == text
