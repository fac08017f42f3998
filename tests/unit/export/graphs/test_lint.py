"""Lint: no findings on exported graphs, and one finding for each rule on a graph made to break
it."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import export.pipeline
import serving.cli.console
from export.__main__ import app
from export.gate.parity import Expected
from export.gate.verify import judged, verify
from export.graphs.lint import lint
from serving.bundles.bundle import Bundle, describe_file
from serving.errors import BundleError
from tests.support.references import some_ids, some_pixels

HALF = TensorProto.FLOAT16


def broken(bundle: Bundle, tmp_path: Path, name: str, change) -> Path:
    """A copy of the graph `name` of `bundle`, after `change`."""
    model = onnx.load(bundle.path / name)
    change(model)
    path = tmp_path / name
    onnx.save(model, path)
    return path


def problems(bundle: Bundle, tmp_path: Path, name: str, change) -> list[str]:
    return lint(broken(bundle, tmp_path, name, change), name.split(".")[0])


def constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def first(model: onnx.ModelProto, kind: str) -> tuple[int, onnx.NodeProto]:
    return next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == kind)


def replace_node(model: onnx.ModelProto, index: int, nodes: list[onnx.NodeProto]) -> None:
    every = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*every[:index], *nodes, *every[index + 1 :]])


def in_half(kind: str):
    """Compute the first `kind` node in float16, as a careless export of a half-precision tower
    does."""

    def change(model: onnx.ModelProto) -> None:
        index, node = first(model, kind)
        halves = [f"{name}_half" for name in node.input]
        casts = [
            helper.make_node("Cast", [name], [half], to=HALF)
            for name, half in zip(node.input, halves, strict=True)
        ]
        back = helper.make_node("Cast", ["half_out"], [node.output[0]], to=TensorProto.FLOAT)
        node.input[:], node.output[:] = halves, ["half_out"]
        replace_node(model, index, [*casts, node, back])

    return change


def take_apart(model: onnx.ModelProto) -> None:
    """LayerNormalization as exporters wrote it before opset 17."""
    index, node = first(model, "LayerNormalization")
    epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
    constant(model, "last", np.array([-1], np.int64))
    constant(model, "epsilon", np.array(epsilon, np.float32))
    x, weight, bias = node.input
    steps = [
        ("ReduceMean", [x, "last"], "mean_"),
        ("Sub", [x, "mean_"], "centred"),
        ("Mul", ["centred", "centred"], "squared"),
        ("ReduceMean", ["squared", "last"], "variance"),
        ("Add", ["variance", "epsilon"], "positive"),
        ("Sqrt", ["positive"], "deviation"),
        ("Div", ["centred", "deviation"], "scaled"),
        ("Mul", ["scaled", weight], "weighted"),
        ("Add", ["weighted", bias], node.output[0]),
    ]
    nodes = [helper.make_node(kind, given, [made], f"my_{made}") for kind, given, made in steps]
    replace_node(model, index, nodes)


def rename(index_of: str, name: str):
    def change(model: onnx.ModelProto) -> None:
        (value,) = getattr(model.graph, index_of)
        for node in model.graph.node:
            node.input[:] = [name if given == value.name else given for given in node.input]
            node.output[:] = [name if made == value.name else made for made in node.output]
        value.name = name

    return change


def fix_axis(axis: int):
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 1

    return change


def retype(which: str, to: int):
    def change(model: onnx.ModelProto) -> None:
        getattr(model.graph, which)[0].type.tensor_type.elem_type = to

    return change


def float_ids(model: onnx.ModelProto) -> None:
    """Compare token ids with the end-of-text id as floats."""
    index, node = first(model, "Equal")
    ids, end = node.input
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    constant(model, "float_end", values[end].astype(np.float32))
    cast = helper.make_node("Cast", [ids], ["float_ids"], "ids_to_float", to=TensorProto.FLOAT)
    node.input[:] = ["float_ids", "float_end"]
    replace_node(model, index, [cast, node])


def two_reductions(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ReduceMin", ["input_ids"], ["other"]))


def infinite_mask(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "causal_mask")
    mask = numpy_helper.to_array(tensor).copy()
    mask[mask < 0] = -np.inf
    tensor.CopyFrom(numpy_helper.from_array(mask, "causal_mask"))


def infinite_scalar(**attribute):
    """Other ways to write one infinity, each an attribute of a Constant node."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["masked"], **attribute))

    return change


def infinite_fill(model: onnx.ModelProto) -> None:
    """The graph of `torch.full((n, n), -inf).triu(1)`."""
    constant(model, "shape_", np.array([2, 2], np.int64))
    value = numpy_helper.from_array(np.array([-np.inf], np.float32))
    node = helper.make_node("ConstantOfShape", ["shape_"], ["filled"], value=value)
    model.graph.node.insert(0, node)


def raw_pixels(model: onnx.ModelProto) -> None:
    """Leave out the subtraction of the mean, so that the client has to normalize."""
    index, node = first(model, "Sub")
    replace_node(model, index, [helper.make_node("Identity", [node.input[0]], [node.output[0]])])


def one_mean_for_all(model: onnx.ModelProto) -> None:
    _, node = first(model, "Sub")
    node.input[1] = constant(model, "grey", np.array(127.5, np.float32))


def old_opset(model: onnx.ModelProto) -> None:
    next(o for o in model.opset_import if o.domain == "").version = 16


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_exported_graphs_have_no_findings(tiny_bundle, tower, precision):
    assert lint(tiny_bundle.path / f"{tower}.{precision}.onnx", tower) == []


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("image.fp32", rename("output", "embedding"), r"outputs \['embedding'\]; expected"),
        ("text.fp32", rename("input", "ids"), r"inputs \['ids'\].*expected \['input_ids'\]"),
        ("image.fp32", fix_axis(0), r"pixels has shape \[1, 3, 32, 32\]; of 4 axes 0 must"),
        ("text.fp32", fix_axis(0), r"input_ids has shape \[1, 'length'\]; of 2 axes 0 and 1 must"),
        ("text.int8", fix_axis(1), r"input_ids has shape \['batch', 1\]; of 2 axes 0 and 1 must"),
        ("text.fp32", retype("input", TensorProto.INT64), r"input_ids is not INT32"),
        ("image.fp32", retype("input", TensorProto.FLOAT), r"pixels is not UINT8"),
        ("image.fp16", retype("output", HALF), r"image_embeds is not FLOAT"),
        ("image.fp32", take_apart, r"my_mean_: a LayerNorm decomposed"),
        ("text.fp16", take_apart, r"my_mean_: a LayerNorm decomposed"),
        ("image.fp16", in_half("LayerNormalization"), r"\w+: LayerNorm in half precision"),
        ("text.fp16", in_half("Softmax"), r"\w+: softmax in half precision"),
        ("text.fp16", float_ids, r"ids_to_float: token ids are cast to floats before"),
        ("text.fp32", two_reductions, r"2 ReduceMin nodes; expected one"),
        ("text.fp16", infinite_mask, r"constant 'causal_mask' is not finite"),
        ("text.fp16", infinite_fill, r"constant 'filled' is not finite"),
        ("image.fp32", raw_pixels, r"pixels are not normalized inside the graph"),
        ("image.fp32", one_mean_for_all, r"pixels are not normalized inside the graph"),
        ("image.fp16", old_opset, r"opset 16; expected at least 17"),
    ],
)
def test_each_rule_reports_its_fault(tiny_bundle, tmp_path, name, change, expected):
    """One fault gives one message, which names the file."""
    (found,) = problems(tiny_bundle, tmp_path, f"{name}.onnx", change)
    assert re.match(rf"{re.escape(name)}\.onnx: .*{expected}", found)


@pytest.mark.parametrize(
    "attribute",
    [
        {"value": numpy_helper.from_array(np.array(-np.inf, np.float32))},
        {"value": numpy_helper.from_array(np.array([[0, -np.inf]], np.float16))},
        {"value_float": -np.inf},
        {"value_floats": [0.0, np.inf]},
        {"value": numpy_helper.from_array(np.array(np.nan, np.float64))},
    ],
)
def test_infinity_is_found_in_every_attribute(tiny_bundle, tmp_path, attribute):
    (found,) = problems(tiny_bundle, tmp_path, "text.fp16.onnx", infinite_scalar(**attribute))
    assert "constant 'masked' is not finite" in found


@pytest.mark.parametrize("attribute", [{"value_float": -3e4}, {"value_int": 7}])
def test_finite_constants_have_no_findings(tiny_bundle, tmp_path, attribute):
    assert not problems(tiny_bundle, tmp_path, "text.fp16.onnx", infinite_scalar(**attribute))


def test_an_infinity_in_external_data_is_found(tiny_bundle, tmp_path):
    model = onnx.load(tiny_bundle.path / "text.fp32.onnx")
    infinite_mask(model)
    path = tmp_path / "text.fp32.onnx"
    onnx.save(model, path, save_as_external_data=True, location="text.fp32.onnx.data")
    assert path.stat().st_size < 200_000
    (found,) = lint(path, "text")
    assert "constant 'causal_mask' is not finite" in found


def test_all_faults_are_reported(tiny_bundle, tmp_path):
    def change(model):
        infinite_mask(model)
        float_ids(model)
        fix_axis(0)(model)

    assert len(problems(tiny_bundle, tmp_path, "text.fp32.onnx", change)) == 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("image.fp32", take_apart),
        ("image.fp16", in_half("LayerNormalization")),
        ("text.fp16", in_half("Softmax")),
        ("text.fp32", float_ids),
    ],
)
def test_faulty_graphs_pass_the_checker_and_run(tiny_bundle, tmp_path, name, change):
    """The faults are those of a working exporter: on tiny towers, the graphs still give good
    results."""
    path = broken(tiny_bundle, tmp_path, f"{name}.onnx", change)
    onnx.checker.check_model(path, full_check=True)
    batch = some_pixels(2, 32) if name.startswith("image") else some_ids([3, 30])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    got, want = (
        onnxruntime.InferenceSession(file, options).run(
            None, {"pixels" if name.startswith("image") else "input_ids": batch}
        )[0]
        for file in (path, tiny_bundle.path / f"{name}.onnx")
    )
    np.testing.assert_allclose(got, want, atol=5e-3)


@pytest.fixture
def faulty(tiny_bundle, tmp_path) -> Bundle:
    """A bundle whose manifest names one graph, a text graph with an infinite mask."""
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    file = broken(tiny_bundle, tmp_path, "text.fp16.onnx", infinite_mask)
    shutil.copy(file, path / file.name)
    artifact = replace(
        tiny_bundle.artifact("text", "fp16"), files=(describe_file(path / file.name),)
    )
    bundle = Bundle(path, replace(tiny_bundle.manifest, artifacts=(artifact,)))
    (path / "manifest.json").write_text(bundle.manifest.to_json())
    return bundle


def test_graph_with_findings_gets_no_verdict(faulty):
    expected = Expected(probes=[], labelled=None)
    with pytest.raises(BundleError, match=r"^text\.fp16\.onnx: constant 'causal_mask' is not fin"):
        judged(faulty, faulty.artifact("text", "fp16"), expected)
    with pytest.raises(BundleError, match=r"text\.fp16\.onnx: constant 'causal_mask'"):
        verify(faulty, None, None, lambda step, done=0, total=0: None)


def test_verify_command_runs_lint(faulty, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "verify", str(faulty.path)])
    with pytest.raises(SystemExit) as ended:
        serving.cli.console.run(app)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert "error: text.fp16.onnx: constant 'causal_mask' is not finite" in shown.err
    assert shown.out == ""


def test_build_runs_lint_on_its_graphs(tiny_checkpoint, tmp_path, monkeypatch, kept_graphs):
    """An infinite mask stops the build, so it never becomes part of a bundle."""
    from export.checkpoints.load import load_checkpoint

    def export_infinite(tower, path, metadata):
        files = kept_graphs(tower, path, metadata)
        model = onnx.load(path)
        infinite_mask(model)
        onnx.save(model, path)
        return files

    monkeypatch.setattr(export.pipeline, "export_onnx", export_infinite)
    monkeypatch.setattr(export.pipeline, "TOWERS", ("text",))
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    with pytest.raises(BundleError, match=r"text\.fp32\.onnx: constant 'causal_mask'"):
        export.pipeline.build(
            checkpoint,
            tmp_path / "bundle",
            lambda step, done=0, total=0: None,
            export.pipeline.Options(precisions=()),
        )
    assert not (tmp_path / "bundle").exists()
