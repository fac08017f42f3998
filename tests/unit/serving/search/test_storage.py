"""Indexes that are damaged, belong to another model, or cannot be written."""

import fcntl
import sys
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from serving.bundles.manifest import MANIFEST_FORMAT
from serving.errors import ImageError, InputError, MissingPackageError, TextError, TextTooLongError
from serving.search.build import add, build, remove, update
from serving.search.index import SearchIndex
from serving.search.query import Term
from tests.support.search_data import (
    contents,
    fill,
)


def test_index_of_another_model_is_rejected(index, photos, folder, other):
    before = contents(index)
    told = (
        r"with tiny-clip \(32 dimensions, weights [0-9a-f]{12}\.\.\.\), but this is other-clip \(32"
    )
    with pytest.raises(InputError, match=told):
        SearchIndex.open(index).find(other, [Term(text="a cat")])
    for change in (
        lambda: build(folder, index, other),
        lambda: update(index, other, photos),
        lambda: add(index, [photos / "002.jpg"], other),
    ):
        with pytest.raises(InputError, match=told + ".*cannot be compared; use the same model, o"):
            change()
    assert contents(index) == before


def test_other_embedding_dimension_is_rejected(built, clip):
    identity = replace(clip.identity, embed_dim=64)
    with pytest.raises(InputError, match=r"\(32 dimensions, .* this is tiny-clip \(64 dimensions"):
        SearchIndex.open(built).check(identity)
    with pytest.raises(InputError, match=r"expected queries of shape \[q, 32\], got \[1, 64\]"):
        SearchIndex.open(built).search(np.zeros((1, 64), np.float32), 3)


def flip(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


DAMAGE = {"changed": flip, "truncated": lambda data: data[: len(data) // 2], "empty": lambda _: b""}


@pytest.mark.parametrize("name", ["index.faiss", "embeddings.npy", "paths.jsonl"])
@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
def test_damaged_files_are_named_before_they_are_read(
    index, folder, clip, name, damage, monkeypatch
):
    file = index / "generation-1" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("read before it was checked"))
    before = contents(index)
    state = "missing" if damage == "missing" else r"damaged: \d+ bytes with sha256 [0-9a-f]{16}"
    told = rf"generation-1/{name} is {state}.*restore .* or delete it .*search build {folder} --ou"
    for use in (
        lambda: SearchIndex.open(index),
        lambda: build(folder, index, clip),
        lambda: remove(index, ["*.png"]),
    ):
        with pytest.raises(InputError, match=told):
            use()
    assert contents(index) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"manifest\.json is damaged: Expecting .*; restore .* from a copy, or delete it"),
        ('{"format": 3}', "format 3, expected 'clip search index 1': it is not a search index"),
        ("[]", "format None, expected"),
        ('{"format": "clip search index 1"}', "is damaged: count: missing"),
    ],
)
def test_damaged_or_unrelated_manifest_is_rejected(index, folder, clip, text, message):
    (index / "manifest.json").write_text(text)
    before = contents(index)
    for use in (lambda: SearchIndex.open(index), lambda: build(folder, index, clip)):
        with pytest.raises(InputError, match=message):
            use()
    assert contents(index) == before


def test_manifest_with_files_outside_the_index_is_rejected(index):
    file = index / "manifest.json"
    file.write_text(file.read_text().replace("generation-1/paths.jsonl", "../paths.jsonl"))
    with pytest.raises(
        InputError, match=r"damaged: expected the files generation-1/index\.faiss, g"
    ):
        SearchIndex.open(index)


def test_unwritable_path_is_rejected(folder, clip):
    with pytest.raises(InputError, match="/proc/index cannot be written"):
        build(folder, Path("/proc/index"), clip)


def test_directory_with_other_files_is_unchanged(tmp_path, folder, clip, fp32_bundle):
    holiday = fill(tmp_path / "holiday", 2)
    half = tmp_path / "pending-of-others"
    (half / "pending").mkdir(parents=True)
    file = tmp_path / "file"
    file.write_text("x")
    for path, message in (
        (holiday, "holds other files, such as .*, which are left unchanged; give another d"),
        (half, "holds other files, such as pending"),
        (
            fp32_bundle.path,
            f"format {MANIFEST_FORMAT}, expected 'clip search index 1': it is not a search index",
        ),
        (file, "is a file, expected a directory"),
    ):
        before = contents(path)
        with pytest.raises(InputError, match=message):
            build(folder, path, clip)
        assert contents(path) == before
    with pytest.raises(InputError, match=r"is not a search index: it has no manifest\.json; build"):
        SearchIndex.open(holiday)


def test_directories_without_readable_images_are_rejected(tmp_path, index, clip):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no picture")
    before = contents(index)
    for path in (tmp_path / "new", index):
        with pytest.raises(InputError, match=r"no images in .*empty; expected files of .jpg"):
            build(tmp_path / "empty", path, clip)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match=r"none of the 1 images can be read, such as a\.jpg: e"):
        build(tmp_path / "bad", tmp_path / "new", clip)
    for nothing in (tmp_path / "empty", tmp_path / "bad"):
        with pytest.raises(InputError, match=r"no images in|none of the 1 images can be read"):
            update(index, clip, nothing)
    assert contents(index) == before


def test_index_of_another_directory_is_unchanged(index, photos, clip):
    before = contents(index)
    with pytest.raises(InputError, match=r"is the index of .*, not of .*/photos; give another d"):
        build(photos, index, clip)
    assert contents(index) == before


def test_concurrent_writers_are_rejected(index, folder, clip):
    with (index / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for change in (lambda: remove(index, ["*.png"]), lambda: build(folder, index, clip)):
            with pytest.raises(InputError, match=r"another process is changing "):
                change()
    assert len(SearchIndex.open(index).entries) == 40


def test_invalid_queries_are_rejected(built, folder, clip):
    opened, file = SearchIndex.open(built), folder / "002.jpg"
    for terms, top, error, message in (
        ([], 5, InputError, "nothing to search for: no term has a positive weight"),
        ([Term(text="a", weight=-1)], 5, InputError, "nothing to search for"),
        ([Term(text="a", weight=0)], 5, InputError, "expected a weight other than 0"),
        (
            [Term(text="a", weight=float("nan"))],
            5,
            InputError,
            "other than 0 that is finite in float32, got nan",
        ),
        ([Term()], 5, InputError, "either a text or an image, got neither"),
        ([Term(text="a", picture=file)], 5, InputError, "either a text or an image, got both"),
        ([Term(text="a"), Term(text="a", weight=-1)], 5, InputError, "cancel each other out"),
        (
            [Term(text="word " * 500)],
            5,
            TextTooLongError,
            "502 tokens, .* more than the model's 77",
        ),
        ([Term(text=" ")], 5, TextError, "empty or only whitespace"),
        (
            [Term(picture=folder / "no.jpg")],
            5,
            ImageError,
            r"^images\[0\] \(.*no\.jpg\): no such file",
        ),
        ([Term(text="a")], 41, InputError, "asked for 41 hits, .* holds 40 images; ask for 1 to"),
        ([Term(text="a")], 0, InputError, "asked for 0 hits"),
    ):
        with pytest.raises(error, match=message):
            opened.find(clip, terms, top)
    cut = opened.find(clip, [Term(text="word " * 500)], 5, truncate=True)
    assert cut == opened.find(clip, [Term(text="word " * 75)], 5)


def test_missing_faiss_error_names_the_extra(built, folder, tmp_path, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for use in (lambda: SearchIndex.open(built), lambda: build(folder, tmp_path / "new", clip)):
        with pytest.raises(
            MissingPackageError, match=r"needs faiss.*pip install 'clip-deploy\[search\]'"
        ):
            use()
    assert not (tmp_path / "new").exists()
