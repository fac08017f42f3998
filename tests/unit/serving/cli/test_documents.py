"""`--json` documents have their declared shapes: each is read as its dataclass."""

import json
import os
from dataclasses import fields

import pytest

from export.checkpoints.architectures import KnownCheckpoints, KnownModel
from export.cli.documents import ExportedBundle
from export.doctor.report import DoctorReport
from serving.cli.documents import (
    Answered,
    Assembled,
    Captions,
    Classification,
    Embedded,
    Found,
    IndexChanged,
    Ranking,
)
from serving.search.storage import IndexManifest
from serving.util.typed_json import from_json


@pytest.fixture
def read(run):
    """`read(kind, *arguments)`: read the output of a command as `kind`, with no other output."""

    def ran(kind, *arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return from_json(kind, json.loads(out))

    return ran


@pytest.fixture
def local(tiny_bundle):
    return "--bundle", tiny_bundle.path, "--runner", "onnxruntime:fp32"


def test_embed_prints_embedded(read, local, pictures, tmp_path):
    file = min(pictures.iterdir())
    found = read(Embedded, "embed", file, "--text", "a cat", *local)
    assert found.names == (str(file), "a cat")
    assert found.shape == (2, 32)
    assert [len(row) for row in found.embeddings] == [32, 32]
    output = tmp_path / "embeddings.npz"
    found = read(Embedded, "embed", "--text", "a cat", *local, "--output", output)
    assert (found.shape, found.embeddings) == ((1, 32), ())
    assert output.is_file()


def test_classify_prints_classified(read, local, pictures):
    labels = ("--label", "cat", "--label", "dog")
    found = read(Classification, "classify", pictures, *labels, *local).images
    assert [one.image for one in found] == sorted(map(str, pictures.iterdir()))
    for one in found:
        assert set(one.probabilities) == {"cat", "dog"}
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_rank_and_answer_print_ranked_and_answered(read, local, pictures):
    file = min(pictures.iterdir())
    texts = ("--text", "a cat", "--text", "a dog")
    (ranked,) = read(Ranking, "rank", file, *texts, *local).images
    assert {score.text for score in ranked.texts} == {"a cat", "a dog"}
    question = ("--question", "it shows", "--candidate", "a cat", "--candidate", "a dog")
    answered = read(Answered, "answer", file, *question, *local)
    assert (answered.image, answered.question) == (str(file), "it shows")
    assert sum(score.probability for score in answered.answers) == pytest.approx(1, abs=1e-5)


def test_caption_prints_captioned(read, local, pictures, tmp_path):
    categories = tmp_path / "categories.toml"
    categories.write_text('animal = ["cat", "dog"]\ncolor = ["red", "blue"]\n')
    options = ("--categories", categories, "--threshold", 0)
    found = read(Captions, "caption", pictures, *options, *local).images
    assert [one.image for one in found] == sorted(map(str, pictures.iterdir()))
    for one in found:
        assert one.caption == ", ".join(score.text for score in one.best.values())


def test_search_commands_print_their_documents(read, local, pictures, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for file in pictures.iterdir():
        os.link(file, images / file.name)
    count, index = len(list(images.iterdir())), tmp_path / "index"
    (images / "broken.jpg").write_bytes(b"no image")
    built = read(IndexChanged, "search", "build", images, "--output", index, *local)
    assert (built.images, built.embedded, built.resumed, built.removed) == (count, count, 0, 0)
    assert [one.path for one in built.skipped] == ["broken.jpg"]
    info = read(IndexManifest, "search", "info", index)
    assert info.count == count
    found = read(Found, "search", "query", index, "a cat", "--top", 2, *local)
    assert (found.index, len(found.hits), found.sheet) == (str(index), 2, None)
    first = found.hits[0]
    removed = read(IndexChanged, "search", "remove", index, first.path)
    assert (removed.images, removed.removed) == (count - 1, 1)
    added = read(IndexChanged, "search", "add", index, first.file, *local)
    assert (added.images, added.embedded) == (count, 1)
    updated = read(IndexChanged, "search", "update", index, *local)
    assert (updated.images, updated.kept) == (count, count)


def test_assemble_prints_assembled(read, tiny_bundle, tmp_path):
    output = tmp_path / "repository"
    options = ("--output", output, "--runner", "onnxruntime:fp32")
    found = read(Assembled, "assemble", tiny_bundle.path, *options)
    assert (found.repository, found.backend, found.latencies) == (str(output), "python", ())
    assert {"clip_image", "clip_text", "clip_zero_shot"} <= set(found.models)
    assert {path.name for path in output.iterdir() if path.is_dir()} == set(found.models)


def test_verify_prints_exported_bundle(read, fp32_bundle):
    found = read(ExportedBundle, "verify", fp32_bundle.path)
    assert (found.path, found.manifest.name) == (str(fp32_bundle.path), fp32_bundle.manifest.name)


def test_list_and_doctor_print_their_documents(read, run):
    code, out, err = run("list", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {field.name for field in fields(KnownCheckpoints)}
    models = from_json(tuple[KnownModel, ...], found["models"])
    assert {model.architecture for model in models} <= set(found["architectures"])
    assert read(DoctorReport, "doctor").runners
