"""Exported graphs: inputs and outputs, dynamic axes, file contents, and location of the weights."""

import json
import re
import shutil
import site
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export.gate.verify
import export.graphs.onnx_export
import export.pipeline
from export.checkpoints.configs import config_from_openai
from export.checkpoints.load import load_checkpoint
from export.checkpoints.weight_names import load_state
from export.graphs.onnx_export import example_batch, export_onnx
from export.pipeline import Options, build
from export.precisions import Precision
from export.towers.clip import Clip
from serving.bundles.bundle import Bundle
from serving.errors import BundleError
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec
from serving.util.progress import silent
from tests.support.paths import CHECKOUT
from tests.support.references import MEAN, STD, openai_clip, some_ids, some_pixels

UINT8, INT32, FLOAT = (
    onnx.TensorProto.UINT8,
    onnx.TensorProto.INT32,
    onnx.TensorProto.FLOAT,
)


@pytest.fixture(scope="module", params=["image", "text"])
def tower(request):
    return request.param


@pytest.fixture(scope="module")
def path(tiny_bundle, tower) -> Path:
    return tiny_bundle.path / f"{tower}.fp32.onnx"


@pytest.fixture(scope="module")
def graph(path) -> onnx.ModelProto:
    return onnx.load(path)


def axes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_have_the_expected_types_and_axes(graph, tower):
    (given,), (made,) = graph.graph.input, graph.graph.output
    if tower == "image":
        assert (given.name, given.type.tensor_type.elem_type) == ("pixels", UINT8)
        assert axes(given) == ["batch", 3, 32, 32]
        assert made.name == "image_embeds"
    else:
        assert (given.name, given.type.tensor_type.elem_type) == ("input_ids", INT32)
        assert axes(given) == ["batch", "length"]
        assert made.name == "text_embeds"
    assert made.type.tensor_type.elem_type == FLOAT
    assert axes(made) == ["batch", 32]


def test_graph_passes_the_onnx_checker(path):
    onnx.checker.check_model(path, full_check=True)


def test_opset_is_20(graph):
    assert {o.domain: o.version for o in graph.opset_import}[""] == 20


def test_each_layer_norm_is_one_node(graph, tower):
    kinds = [node.op_type for node in graph.graph.node]
    # Two per block, before and after the image tower's blocks, and after the text tower's.
    assert kinds.count("LayerNormalization") == {"image": 6, "text": 5}[tower]
    assert "ReduceMean" not in kinds
    assert kinds.count("Softmax") == 2
    assert not {"IsNaN", "Attention"} & set(kinds)


def test_every_weight_is_finite(graph):
    for tensor in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        assert np.isfinite(values).all(), tensor.name
        assert np.abs(values).max(initial=0) < 65504 or values.dtype.kind == "i", tensor.name


def test_file_contains_no_local_paths(path):
    content = path.read_bytes()
    for place in (str(CHECKOUT), "site-packages", *site.getsitepackages(), "Traceback"):
        assert place.encode() not in content, place
    assert not re.search(rb"[\w/]+\.py\b", content)


def test_metadata_names_source_and_versions(graph, tiny_checkpoint):
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert facts["source"] == str(tiny_checkpoint)
    assert facts["weights_sha256"] == load_checkpoint(str(tiny_checkpoint)).weights_sha256
    assert facts["torch"] == torch.__version__
    assert facts["onnx"] == onnx.__version__
    assert graph.producer_name == "clip-deploy"
    assert not graph.graph.value_info


def run(path: Path, batch: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


@pytest.mark.parametrize("count", [1, 3, 17])
def test_image_batch_is_dynamic(tiny_bundle, count):
    out = run(tiny_bundle.path / "image.fp32.onnx", some_pixels(count, 32))
    assert (out.shape, out.dtype) == ((count, 32), np.float32)
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("length", [2, 9, 77])
@pytest.mark.parametrize("count", [1, 3])
def test_text_batch_and_length_are_dynamic(tiny_bundle, tiny_checkpoint, count, length):
    ids = some_ids([1, min(5, length - 1), length - 1][:count], length)
    out = run(tiny_bundle.path / "text.fp32.onnx", ids)
    with torch.inference_mode():
        want = load_checkpoint(str(tiny_checkpoint)).clip.text(torch.from_numpy(ids)).numpy()
    assert out.shape == (count, 32)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_a_resnet_exports(tmp_path):
    model = openai_clip("resnet")
    clip = Clip(config_from_openai(model.state_dict(), "quick_gelu"), MEAN, STD)
    load_state(clip, model.state_dict(), "openai")
    files = export_onnx(clip.eval().image, tmp_path / "image.fp32.onnx", {"source": "test"})
    assert files == [tmp_path / "image.fp32.onnx"]
    for count in (1, 3):
        pixels = some_pixels(count, 64)
        with torch.inference_mode():
            want = clip.image(torch.from_numpy(pixels)).numpy()
        np.testing.assert_allclose(run(files[0], pixels), want, atol=1e-5)


def test_module_that_is_not_a_tower_is_rejected():
    with pytest.raises(TypeError, match=r"expected an ImageTower, .*, got Linear"):
        example_batch(torch.nn.Linear(2, 2))


@pytest.fixture(scope="module")
def external(tiny_checkpoint, tmp_path_factory) -> Bundle:
    """A bundle exported with a lowered size limit, so that its weights are in separate files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.graphs.onnx_export, "PROTOBUF_LIMIT", 100_000)
        only = [RunnerSpec("onnxruntime", "fp32")]
        patch.setattr(export.gate.verify, "runners_of", lambda _: only)
        output = tmp_path_factory.mktemp("external") / "bundle"
        options = Options(precisions=(Precision.FP32,))
        return build(load_checkpoint(str(tiny_checkpoint)), output, silent, options)


def test_large_weights_are_stored_beside_the_graph(external, tiny_bundle):
    for tower in ("image", "text"):
        artifact = external.artifact(tower, "fp32")
        graph, data = artifact.files
        assert (graph.name, data.name) == (f"{tower}.fp32.onnx", f"{tower}.fp32.onnx.data")
        assert graph.bytes < 100_000 < data.bytes == (external.path / data.name).stat().st_size
        assert artifact.passed("onnxruntime:fp32")
    batch = some_pixels(2, 32)
    with (
        open_runner(external, "image", "onnxruntime:fp32") as beside,
        open_runner(tiny_bundle, "image", "onnxruntime:fp32") as inside,
    ):
        np.testing.assert_allclose(beside.run(batch), inside.run(batch), atol=1e-6)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_changed_external_data_is_rejected(external, tmp_path, damage):
    path = Path(shutil.copytree(external.path, tmp_path / "bundle"))
    data = path / "text.fp32.onnx.data"
    if damage == "changed":
        with data.open("r+b") as file:
            file.seek(5000)
            file.write(b"\1\2\3\4")
    else:
        data.unlink()
    bundle = Bundle.open(path)
    with pytest.raises(BundleError, match=re.escape(str(data))):
        open_runner(bundle, "text", "onnxruntime:fp32").__enter__()


def test_manifest_records_file_sizes(tiny_bundle):
    document = json.loads((tiny_bundle.path / "manifest.json").read_text())
    for artifact in document["artifacts"]:
        for file in artifact["files"]:
            assert (tiny_bundle.path / file["name"]).stat().st_size == file["bytes"]
