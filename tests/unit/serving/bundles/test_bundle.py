"""The bundle's manifest and files, atomic replacement of directories, and typed JSON."""

import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import MANIFEST_FORMAT, TOWERS
from serving.errors import BundleError, InputError
from serving.inputs.tokenizer import Tokenizer
from serving.util.files import link_or_copy, new_directory, sha256_of, write_text
from serving.util.typed_json import from_json

# ------------------------------------------------------------------------------------ bundle


@pytest.fixture
def copy(tiny_bundle, tmp_path) -> Path:
    """A copy of the tiny bundle that tests may damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "spoiled"))


def edit(path: Path, change) -> None:
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    return str(caught.value)


def test_manifest_lists_every_file_of_the_bundle(tiny_bundle):
    manifest = tiny_bundle.manifest
    vouched = {file.name for artifact in manifest.artifacts for file in artifact.files}
    vouched |= {manifest.tokenizer.name, "manifest.json"}
    assert {file.name for file in tiny_bundle.path.iterdir()} == vouched
    for tower in TOWERS:
        artifact = tiny_bundle.artifact(tower, "fp32")
        assert artifact.file == f"{tower}.fp32.onnx"
        assert tiny_bundle.verified(artifact) == tiny_bundle.path / artifact.file
    assert len(Tokenizer(tiny_bundle.tokenizer, manifest.text)(["a cat"])) == 1


def test_manifest_round_trip(tiny_bundle):
    text = (tiny_bundle.path / "manifest.json").read_text()
    assert Bundle.open(tiny_bundle.path).manifest.to_json() == text
    assert json.loads(text)["format"] == MANIFEST_FORMAT


def placed(document: dict, place: str, value: object) -> None:
    *parents, last = (int(part) if part.isdigit() else part for part in place.split("."))
    for parent in parents:
        document = document[parent]
    document[last] = value


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("logit_scale", (math.nan, math.inf, 0.0, -1.0, 1e39, 10**400)),
        ("embed_dim", (0, -1, math.nan, 2**31)),
        ("image.size", (0, -32, math.inf)),
        ("image.resize", (0, math.nan)),
        ("image.mean.1", (math.nan, math.inf, -0.5, 123.7)),
        ("image.std.2", (math.nan, math.inf, 0.0, -0.2, 58.4)),
        ("text.context_length", (0, math.nan)),
        ("text.end_id", (-1, 49408, math.nan)),
        ("artifacts.0.verdicts.0.min_cosine", (math.nan, -math.inf)),
        ("artifacts.0.verdicts.0.max_abs_difference", (math.inf,)),
    ],
)
def test_number_that_no_model_has_is_refused_by_the_name_of_its_field(copy, place, values):
    manifest = copy / "manifest.json"
    sound = manifest.read_text()
    name = re.sub(r"\.(\d+)", r"[\1]", place)
    for value in values:
        manifest.write_text(sound)
        edit(copy, lambda document, v=value: placed(document, place, v))
        with pytest.raises(BundleError) as caught:
            Bundle.open(copy)
        assert f"{name}: " in caught.value.reason.lower()


@pytest.mark.parametrize("file", ["image.fp32.onnx", "text.fp32.onnx", "tokenizer.json"])
def test_tampered_file_error_has_both_checksums(copy, file):
    before = sha256_of(copy / file)
    with (copy / file).open("r+b") as stream:
        stream.seek(-20, os.SEEK_END)
        stream.write(b"X")
    bundle = Bundle.open(copy)

    def use():
        if file == "tokenizer.json":
            return bundle.tokenizer
        return bundle.verified(bundle.artifact(file.split(".")[0], "fp32"))

    with pytest.raises(BundleError) as caught:
        use()
    message = str(caught.value)
    assert f"{copy / file} is not the file that was exported" in message
    assert before[:16] in message
    assert sha256_of(copy / file)[:16] in message
    assert "export the checkpoint again" in message


def test_missing_file_is_rejected(copy):
    (copy / "text.fp32.onnx").unlink()
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"text\.fp32\.onnx is missing; export the checkpoint"):
        bundle.verified(bundle.artifact("text", "fp32"))


def test_precision_that_was_not_exported_is_rejected(tiny_bundle):
    with pytest.raises(BundleError, match=r"has no int4 text graph, only .*fp32.*--precision int4"):
        tiny_bundle.artifact("text", "int4")


def test_missing_manifest_is_rejected(tmp_path):
    message = refused(tmp_path)
    assert f"{tmp_path} is not a bundle: it has no manifest.json" in message
    assert "`clip-deploy export CHECKPOINT`" in message
    assert "is not a bundle" in refused(tmp_path / "absent")


@pytest.mark.parametrize("version", [0, MANIFEST_FORMAT + 1, None, str(MANIFEST_FORMAT)])
def test_other_manifest_format_is_rejected(copy, version):
    edit(copy, lambda d: d.update(format=version))
    assert f"expected manifest format {MANIFEST_FORMAT}, found {version!r}" in refused(copy)


def test_manifest_that_is_not_an_object_is_rejected(copy):
    (copy / "manifest.json").write_text("[1]")
    assert f"expected manifest format {MANIFEST_FORMAT}, found None" in refused(copy)


def test_invalid_json_is_rejected(copy):
    file = copy / "manifest.json"
    file.write_text(file.read_text()[:-100])
    message = refused(copy)
    assert str(file) in message
    assert "line" in message
    assert "export the checkpoint again" in message


def test_manifest_that_is_not_utf8_is_rejected(copy):
    (copy / "manifest.json").write_bytes(b"\xff\xfe{}")
    assert str(copy / "manifest.json") in refused(copy)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda d: d.update(colour="red"), "colour: not a known key"),
        (lambda d: d["image"].update(crop=1), "image.crop: not a known key"),
        (lambda d: d.pop("embed_dim"), "embed_dim: missing"),
        (lambda d: d["text"].pop("end_id"), "text.end_id: missing"),
        (lambda d: d["image"].update(size="32"), "image.size: expected int, found '32'"),
        (lambda d: d["image"].update(size=32.5), "image.size: expected int, found 32.5"),
        (lambda d: d["image"].update(size=True), "image.size: expected int, found True"),
        (lambda d: d["image"].update(mean=[0, 0]), "image.mean: expected 3 items, found [0, 0]"),
        (
            lambda d: d["image"].update(pipeline="mine"),
            "image.pipeline: expected one of 'openai', 'huggingface', found 'mine'",
        ),
        (lambda d: d.update(templates="a {}"), "templates: expected a list, found 'a {}'"),
        (
            lambda d: d["artifacts"][1]["files"][0].update(bytes=None),
            "artifacts[1].files[0].bytes: expected int, found None",
        ),
        (lambda d: d.update(tokenizer=[]), "tokenizer: expected an object, found []"),
        (
            lambda d: d["provenance"]["tools"].update(torch=2),
            "provenance.tools.torch: expected str, found 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_manifest_field_is_named(copy, change, shown):
    edit(copy, change)
    message = refused(copy)
    assert f"{copy / 'manifest.json'}: {shown}" in message
    assert "export the checkpoint again" in message


def test_describe_file_returns_name_size_and_checksum(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    described = describe_file(tmp_path / "x")
    assert (described.name, described.bytes) == ("x", 3)
    # The example of FIPS 180-4, appendix B.1.
    assert described.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ------------------------------------------------------------------------------------- files


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_new_directory_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "target"
    with new_directory(target, "sign") as work:
        (work / "sign").write_text("new")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/target/sign": "new"}


def test_new_directory_replaces_the_whole_old_one(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "sign").write_text("old")
    (target / "other").write_text("old")
    with new_directory(target, "sign") as work:
        (work / "sign").write_text("new")
        assert (target / "other").read_text() == "old"
    assert contents(tmp_path) == {"target/sign": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failing_block_keeps_the_old_directory(tmp_path, error):
    target = tmp_path / "target"
    target.mkdir()
    (target / "sign").write_text("old")

    def fail():
        with new_directory(target, "sign") as work:
            (work / "sign").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == {"target/sign": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_failing_block_creates_no_directory(tmp_path):
    def fail():
        with new_directory(tmp_path / "target", "sign"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_empty_directory_is_replaced(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with new_directory(target, "sign") as work:
        (work / "sign").touch()
    assert (target / "sign").exists()


def test_directory_with_other_files_is_not_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(InputError, match=r"holds other files \(no deep/sign\).*another directory"),
        new_directory(tmp_path, "deep/sign"),
    ):
        pytest.fail("the block was entered")
    assert contents(tmp_path) == {"thesis.tex": "years of work"}


def test_a_file_is_not_deleted(tmp_path):
    (tmp_path / "target").write_text("mine")
    with (
        pytest.raises(InputError, match="target is a file, expected a directory;"),
        new_directory(tmp_path / "target", "sign"),
    ):
        pytest.fail("the block was entered")
    assert contents(tmp_path) == {"target": "mine"}


def test_a_new_directory_can_be_read_by_others(tmp_path):
    """A server in a container runs as another user."""
    umask = os.umask(0o022)
    try:
        with new_directory(tmp_path / "target", "sign") as work:
            write_text(work / "sign", "x")
    finally:
        os.umask(umask)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "target" / "sign").stat().st_mode & 0o777 == 0o644


def test_write_text_is_atomic(tmp_path):
    file = tmp_path / "file.txt"
    write_text(file, "old\n")
    write_text(file, "naïve 猫\n")
    assert file.read_bytes() == "naïve 猫\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half a pair: \ud800")
    assert file.read_bytes() == "naïve 猫\n".encode()


def test_link_or_copy_copies_across_file_systems(tmp_path):
    (tmp_path / "source").write_text("x")
    link_or_copy(tmp_path / "source", tmp_path / "linked")
    assert (tmp_path / "linked").samefile(tmp_path / "source")
    (tmp_path / "symlink").symlink_to("source")
    link_or_copy(tmp_path / "symlink", tmp_path / "resolved")
    assert not (tmp_path / "resolved").is_symlink()
    if Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev:
        elsewhere = Path("/dev/shm") / f"clip-deploy-test-{os.getpid()}"
        try:
            link_or_copy(tmp_path / "source", elsewhere)
            assert elsewhere.read_text() == "x"
        finally:
            elsewhere.unlink(missing_ok=True)


# -------------------------------------------------------------------------------- typed JSON


@dataclass(frozen=True)
class Inner:
    side: int


@dataclass(frozen=True)
class Outer:
    name: str
    ratio: float
    kind: Literal["a", "b"]
    pair: tuple[int, float]
    inner: tuple[Inner, ...]
    extra: dict[str, Inner]
    flag: bool = False


GOOD = {
    "name": "x",
    "ratio": 1,
    "kind": "b",
    "pair": [1, 2.5],
    "inner": [{"side": 1}, {"side": 2}],
    "extra": {"k": {"side": 3}},
}


def test_typed_json_builds_the_declared_types():
    built = from_json(Outer, GOOD)
    assert built == Outer("x", 1.0, "b", (1, 2.5), (Inner(1), Inner(2)), {"k": Inner(3)})
    assert type(built.ratio) is float
    assert from_json(Outer, GOOD | {"flag": True}).flag


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"ratio": "1"}, "ratio: expected float, found '1'"),
        ({"ratio": True}, "ratio: expected float, found True"),
        ({"kind": "c"}, "kind: expected one of 'a', 'b', found 'c'"),
        ({"kind": []}, "kind: expected one of 'a', 'b', found []"),
        ({"pair": [1]}, "pair: expected 2 items, found [1]"),
        ({"pair": {}}, "pair: expected a list, found {}"),
        ({"inner": [{"side": 1}, {}]}, "inner[1].side: missing"),
        ({"inner": [{"side": 1, "x": 2}]}, "inner[0].x: not a known key"),
        ({"extra": {"k": 5}}, "extra.k: expected an object, found 5"),
        ({"extra": []}, "extra: expected an object, found []"),
        ({"flag": 1}, "flag: expected bool, found 1"),
        ({"name": ["y" * 100]}, "name: expected str, found ['yyyyyy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_typed_json_error_names_the_field(change, shown):
    with pytest.raises(ValueError, match=f"^{re.escape(shown)}") as caught:
        from_json(Outer, GOOD | change)
    assert len(str(caught.value)) < 120


def test_typed_json_rejects_a_non_object():
    with pytest.raises(ValueError, match=r"^document: expected an object, found 3$"):
        from_json(Outer, 3)
