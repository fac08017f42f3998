"""Artifacts that differ from the exported files: damaged, swapped, edited, or linked to other
places."""

import contextlib
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.external_data import external_files
from serving.bundles.integrity import sealed, unsealed
from serving.clients.local import LocalClip
from serving.errors import BundleError
from serving.runners.registry import open_runner
from serving.triton.repository import assemble

RUNNER = "onnxruntime:fp32"


@pytest.fixture
def copy(fp32_bundle, tmp_path) -> Path:
    """A copy of the fp32 bundle that tests may damage."""
    return Path(shutil.copytree(fp32_bundle.path, tmp_path / "spoiled"))


def through_local_clip(path, tmp_path):
    with LocalClip(path, RUNNER):
        pass


def through_open_runner(path, tmp_path):
    bundle = Bundle.open(path)
    for tower in ("image", "text"):
        with open_runner(bundle, tower, RUNNER):
            pass
    assert bundle.tokenizer


def through_assembly(path, tmp_path):
    assemble(Bundle.open(path), tmp_path / "repository", runner=RUNNER)


USES = [through_local_clip, through_open_runner, through_assembly]


def flip(file: Path, position: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def reseal(path: Path, change) -> None:
    """Change the manifest and write a valid checksum, like an attacker who knows the format."""
    document = unsealed(json.loads((path / "manifest.json").read_text()))
    change(document)
    (path / "manifest.json").write_text(sealed(document))


def described(path: Path, *names: str):
    """A change of the manifest that lists these files as the image tower's graph."""
    files = [
        {"name": name, "sha256": described.sha256, "bytes": described.bytes}
        for name in names
        for described in [describe_file(path / name, path)]
    ]

    def change(document):
        (artifact,) = (a for a in document["artifacts"] if a["graph"] == "image")
        artifact["files"] = files

    return change


SPOILED = {
    "a bit of the image graph": lambda path: flip(path / "image.fp32.onnx", 70_000, 3),
    "a bit of the text graph": lambda path: flip(path / "text.fp32.onnx", 1_000_000, 0),
    "a truncated graph": lambda path: (path / "text.fp32.onnx").write_bytes(
        (path / "text.fp32.onnx").read_bytes()[:-1]
    ),
    "an empty graph": lambda path: (path / "image.fp32.onnx").write_bytes(b""),
    "the other tower's graph": lambda path: shutil.copy(
        path / "text.fp32.onnx", path / "image.fp32.onnx"
    ),
    "another model's tokenizer": lambda path: (path / "tokenizer.json").write_text(
        (path / "tokenizer.json").read_text().replace('"cat</w>"', '"act</w>"')
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("spoiled", SPOILED)
def test_changed_files_are_rejected(copy, tmp_path, spoiled, use):
    use(copy, tmp_path)
    shutil.rmtree(tmp_path / "repository", ignore_errors=True)
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    SPOILED[spoiled](copy)
    (changed,) = (name for name in before if (copy / name).read_bytes() != before[name])
    with pytest.raises(BundleError, match=rf"{re.escape(changed)} is not the file that was exp"):
        use(copy, tmp_path)
    assert not (tmp_path / "repository").exists()


def test_any_flipped_bit_is_detected(copy, figure):
    """Covers every file of a bundle."""
    rng, flips = random.Random(0), 0
    manifest = Bundle.open(copy).manifest
    for name, count in (
        ("manifest.json", 300),
        ("image.fp32.onnx", 50),
        ("text.fp32.onnx", 10),
        ("tokenizer.json", 20),
    ):
        good = (copy / name).read_bytes()
        for _ in range(count):
            flip(copy / name, rng.randrange(len(good)), rng.randrange(8))
            if name != "manifest.json":
                with pytest.raises(BundleError):
                    through_open_runner(copy, None)
            else:
                with contextlib.suppress(BundleError):  # `1E-05` equals `1e-05`
                    assert Bundle.open(copy).manifest == manifest
            (copy / name).write_bytes(good)
            flips += 1
    figure(
        "damaged bundle", f"{flips} flipped bits in {len(list(copy.iterdir()))} files, all found"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["artifacts"][0]["verdicts"][0].update(passed=False),
        lambda d: d.update(logit_scale=d["logit_scale"] * 2),
        lambda d: d["image"].update(mean=[0.5, 0.5, 0.5]),
        lambda d: d["artifacts"][0]["files"][0].update(sha256="0" * 64),
    ],
    ids=["verdict", "scale", "mean", "sha256"],
)
@pytest.mark.parametrize("use", USES)
def test_edited_manifest_is_rejected(copy, tmp_path, change, use):
    document = json.loads((copy / "manifest.json").read_text())
    change(document)
    (copy / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="it was edited or damaged after it was written"):
        use(copy, tmp_path)


def test_manifest_without_checksum_is_rejected(copy):
    document = unsealed(json.loads((copy / "manifest.json").read_text()))
    (copy / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"field says None.*export the checkpoint again"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["../elsewhere.onnx", "/etc/passwd", "a/../../b", ".", ""])
@pytest.mark.parametrize("where", ["tokenizer", "graph"])
def test_file_names_outside_the_bundle_are_rejected(copy, name, where):
    def change(document):
        named = document["tokenizer"] if where == "tokenizer" else document["artifacts"][0]
        (named if where == "tokenizer" else named["files"][0])["name"] = name

    reseal(copy, change)
    with pytest.raises(BundleError, match=rf"names the file {re.escape(repr(name))}; expected"):
        Bundle.open(copy)


@pytest.mark.parametrize("use", USES)
def test_link_out_of_the_bundle_is_rejected(copy, tmp_path, use):
    (copy / "image.fp32.onnx").rename(copy / "other.onnx")
    (copy / "image.fp32.onnx").symlink_to("other.onnx")
    use(copy, tmp_path)  # links inside the bundle are allowed
    (copy / "other.onnx").rename(tmp_path / "elsewhere.onnx")
    (copy / "image.fp32.onnx").unlink()
    (copy / "image.fp32.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match=r"is a link to .*elsewhere\.onnx, outside the bundle"):
        use(copy, tmp_path)


# ------------------------------------------------------------------ external data


def externalised(path: Path, location: str) -> None:
    """Store the image graph's weights in `image.data`, and name `location` in the graph."""
    model = onnx.load(path / "image.fp32.onnx")
    with (path / "image.data").open("wb") as data:
        for tensor in model.graph.initializer:
            raw = numpy_helper.to_array(tensor).tobytes()
            if len(raw) < 1024:
                continue
            tensor.raw_data = raw
            set_external_data(tensor, location, offset=data.tell(), length=len(raw))
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            data.write(raw)
    onnx.save(model, path / "image.fp32.onnx")


@pytest.mark.parametrize("use", USES)
def test_external_data_in_the_manifest_is_loaded(copy, tmp_path, fp32_bundle, use):
    externalised(copy, "image.data")
    reseal(copy, described(copy, "image.fp32.onnx", "image.data"))
    use(copy, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    with (
        open_runner(Bundle.open(copy), "image", RUNNER) as split,
        open_runner(fp32_bundle, "image", RUNNER) as whole,
    ):
        np.testing.assert_array_equal(split.run(pixels), whole.run(pixels))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("location", ["../image.data", "{}/image.data", "unknown.data", "./x/../y"])
def test_external_data_outside_the_bundle_is_rejected(copy, tmp_path, location, use):
    location = location.format(copy)
    externalised(copy, location)
    shutil.copy(copy / "image.data", tmp_path / "image.data")
    reseal(copy, described(copy, "image.fp32.onnx", "image.data"))
    expected = rf"reads weights from {re.escape(repr(location))}; expected a file in the same"
    with pytest.raises(BundleError, match=expected):
        use(copy, tmp_path)


def test_external_data_behind_a_link_is_rejected(copy, tmp_path):
    externalised(copy, "image.data")
    reseal(copy, described(copy, "image.fp32.onnx", "image.data"))
    (copy / "image.data").rename(tmp_path / "elsewhere.data")
    (copy / "image.data").symlink_to(tmp_path / "elsewhere.data")
    with pytest.raises(BundleError, match=r"image\.data is a link to .*outside the bundle"):
        through_local_clip(copy, tmp_path)


def at(location: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), f"at {location}")
    set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def test_external_data_is_found_in_all_tensors(tmp_path, tiny_bundle):
    def constant(location):
        return helper.make_node("Constant", [], [location], value=at(location))

    branch = helper.make_graph([constant("branch")], "branch", [], [], [at("inner")])
    sparse = onnx.SparseTensorProto(values=at("values"), indices=at("indices"), dims=[4])
    nodes = [
        constant("attribute"),
        helper.make_node("If", ["x"], ["y"], then_branch=branch),
        helper.make_node("Mine", ["x"], ["z"], domain="mine", tensors=[at("list")]),
        helper.make_node("Mine", ["x"], ["w"], domain="mine", graphs=[branch], sparse=sparse),
    ]
    graph = helper.make_graph(nodes, "graph", [], [], [at("initializer")])
    graph.sparse_initializer.append(sparse)
    function = helper.make_function("mine", "F", [], [], [constant("function")], [])
    function.attribute_proto.append(helper.make_attribute("default", at("default")))
    model = helper.make_model(graph, functions=[function])
    training = model.training_info.add()
    training.initialization.initializer.append(at("training"))
    training.algorithm.initializer.append(at("algorithm"))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert external_files(tmp_path / "model.onnx") == {
        *("branch", "inner", "values", "indices", "attribute", "list", "initializer"),
        *("function", "default", "training", "algorithm"),
    }
    for artifact in tiny_bundle.manifest.artifacts:
        assert external_files(tiny_bundle.path / artifact.file) == set()


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 20, b"\x3a\xff\x01", b"\x3b", b"\x3a\x05\x2a\x7f"], ids=repr
)
def test_file_that_is_not_a_graph_is_rejected(copy, data):
    (copy / "image.fp32.onnx").write_bytes(data)
    with pytest.raises(ValueError, match=r"."):
        external_files(copy / "image.fp32.onnx")
    reseal(copy, described(copy, "image.fp32.onnx"))
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"image\.fp32\.onnx is not an ONNX graph"):
        bundle.verified(bundle.artifact("image", "fp32"))


def test_changed_engine_is_rejected(copy):
    """An engine contains machine code, so its checksum is verified before any library reads it."""
    (copy / "image.plan").write_bytes(b"plan")
    bundle = Bundle.open(copy)
    plan = replace(
        bundle.artifact("image", "fp32"), kind="engine", files=(describe_file(copy / "image.plan"),)
    )
    assert bundle.verified(plan) == copy / "image.plan"
    (copy / "image.plan").write_bytes(b"plam")
    with pytest.raises(BundleError, match=r"image\.plan is not the file that was exported"):
        bundle.verified(plan)
