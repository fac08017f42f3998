"""Data of an export: valid and invalid directories and files of users."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.gate.datasets import CALIBRATION_TEXTS, load_data, probes
from serving.bundles.bundle import Bundle
from serving.errors import InputError, TextError
from serving.inputs.preprocess import preprocess
from serving.inputs.tokenizer import Tokenizer
from serving.util.directories import find_images, read_captions, read_lines

TEMPLATES = ("a photo of a {}.", "the {}")


@pytest.fixture
def folder(pictures, tmp_path) -> Path:
    """A copy of the directory with the eight valid images."""
    return Path(shutil.copytree(pictures, tmp_path / "folder"))


@pytest.fixture(scope="session")
def tokenizer(tiny_bundle) -> Tokenizer:
    return Tokenizer(tiny_bundle.tokenizer, tiny_bundle.manifest.text)


def load(bundle: Bundle, tokenizer: Tokenizer, **given):
    manifest = bundle.manifest
    return load_data(
        manifest.image, tokenizer, TEMPLATES, manifest.text, progress=lambda _: None, **given
    )


def test_synthetic_probes_are_the_default_data(tiny_bundle, tokenizer):
    data, again = load(tiny_bundle, tokenizer), load(tiny_bundle, tokenizer)
    assert data.source == "synthetic probes"
    assert (data.labelled, data.skipped) == (None, ())
    for tower in ("image", "text"):
        assert len(data.calibration[tower]) > 1
        for one, other in zip(data.calibration[tower], again.calibration[tower], strict=True):
            assert np.array_equal(one, other)
    assert {batch.shape[1] for batch in data.calibration["text"]} == {8, 16, 24, 32, 48, 77}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_parity_probes_are_deterministic_and_unlike_calibration_data(tiny_bundle, tokenizer, tower):
    """Verdicts on INT8 would be too favorable if the probes were also its calibration data."""
    image, text = tiny_bundle.manifest.image, tiny_bundle.manifest.text
    one, two = (list(probes(tower, image, text)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    seen = {row.tobytes() for b in load(tiny_bundle, tokenizer).calibration[tower] for row in b}
    rows = [row for batch in one for row in batch]
    if tower == "text":  # an empty text has the same tokens everywhere
        rows = [row for row in rows if row[1] != text.end_id]
    assert len(rows) >= 16
    assert not any(row.tobytes() in seen for row in rows)


def test_images_become_batches_in_the_order_of_their_names(tiny_bundle, tokenizer, folder):
    (folder / "inner").mkdir()
    for number in range(10):
        shutil.copy(folder / "wide.jpg", folder / "inner" / f"{number}.JPG")
    data = load(tiny_bundle, tokenizer, pictures=folder)
    assert [len(batch) for batch in data.calibration["image"]] == [16, 2]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    want = [preprocess(file, tiny_bundle.manifest.image) for file in files]
    assert np.array_equal(np.concatenate(data.calibration["image"]), np.stack(want))
    assert data.source == "18 images of folder"
    assert data.skipped == ()


def test_unreadable_images_are_named_and_skipped(tiny_bundle, tokenizer, folder):
    (folder / "aaa.jpg").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.jpg").write_bytes((folder / "wide.jpg").read_bytes()[:300])
    (folder / "notes.md").write_text("not looked at")
    (folder / "a-folder.png").mkdir()  # a directory, so not an image
    data = load(tiny_bundle, tokenizer, pictures=folder)
    assert sum(map(len, data.calibration["image"])) == 8
    assert data.source == "8 images of folder"
    named = [re.match(r"([\w.-]+): \S", reason)[1] for reason in data.skipped]
    assert named == ["aaa.jpg", "empty.png", "half.jpg"]


def test_build_reports_skipped_images(tiny_bundle, tiny_checkpoint, folder, tmp_path):
    import export.pipeline
    from export.checkpoints.load import load_checkpoint

    for number in range(7):
        (folder / f"bad{number}.jpg").write_bytes(b"no picture")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.pipeline, "references", lambda *_: dict.fromkeys(("image", "text")))
        patch.setattr(export.pipeline, "_artifacts", lambda *_: [])
        export.pipeline.build(
            load_checkpoint(str(tiny_checkpoint)),
            tmp_path / "out",
            lambda step, done=0, total=0: said.append(step),
            export.pipeline.Options(pictures=folder),
        )
    assert [line for line in said if line.startswith("skipped bad")] != []
    assert "skipped 7 images that cannot be read" in said


def test_directory_of_unreadable_images_is_rejected(tiny_bundle, tokenizer, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of its images can be read; first bad\.jpg: "):
        load(tiny_bundle, tokenizer, pictures=tmp_path)


def test_directory_without_images_is_rejected(tiny_bundle, tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(InputError, match=r"no images in .*; expected files of \.jpg, "):
        load(tiny_bundle, tokenizer, pictures=tmp_path)


def test_missing_directory_or_file_is_rejected(tiny_bundle, tokenizer, tmp_path):
    (tmp_path / "file.jpg").write_bytes(b"")
    for path in (tmp_path / "missing", tmp_path / "file.jpg"):
        for what in ("pictures", "labelled"):
            shown = rf"{path.name}.* (is not a directory|cannot be read)"
            with pytest.raises(InputError, match=shown):
                load(tiny_bundle, tokenizer, **{what: path})


def test_captions_become_token_ids(tiny_bundle, tokenizer, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text(
        "a red circle\n"
        "\n"
        "one.png, a blue square, on the left\n"
        "my picture.JPG,a dog\n"
        "Mr.Smith, a man\n"
        "  a cat, a mat  \n",
        encoding="utf-8-sig",
    )
    data = load(tiny_bundle, tokenizer, captions=file)
    want = [
        "a red circle",
        "a blue square, on the left",
        "a dog",
        "Mr.Smith, a man",
        "a cat, a mat",
    ]
    assert len(data.calibration["text"]) == 1
    assert np.array_equal(data.calibration["text"][0], tokenizer(want))
    assert data.source == "5 captions of captions.txt"


def test_captions_are_limited_and_truncated(tiny_bundle, tokenizer, tmp_path):
    file = tmp_path / "many.txt"
    file.write_text("\n".join(["word " * 200] + [f"number {n}" for n in range(1000)]))
    data = load(tiny_bundle, tokenizer, captions=file)
    assert sum(map(len, data.calibration["text"])) == CALIBRATION_TEXTS
    assert data.calibration["text"][0].shape == (16, 77)
    assert data.calibration["text"][1].shape == (16, 8)


def test_captions_that_are_not_utf8_are_rejected(tiny_bundle, tokenizer, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes("one\ntwo\nein schöner Hund\n".encode("latin-1"))
    with pytest.raises(TextError, match=r"captions\.txt, line 3: not UTF-8 .*save the file as UTF"):
        load(tiny_bundle, tokenizer, captions=file)


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_empty_captions_file_is_rejected(tiny_bundle, tokenizer, tmp_path, content):
    file = tmp_path / "captions.txt"
    file.write_text(content)
    with pytest.raises(InputError, match=r"captions\.txt has no captions; expected one per line"):
        load(tiny_bundle, tokenizer, captions=file)


def test_missing_captions_file_is_rejected(tiny_bundle, tokenizer, tmp_path):
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InputError, match=rf"{path.name} cannot be read"):
            load(tiny_bundle, tokenizer, captions=path)


def labelled(tiny_bundle, tokenizer, folder, captions: str, labels: str | None = None):
    (folder / "captions.txt").write_text(captions)
    if labels is not None:
        (folder / "labels.txt").write_text(labels)
    return load(tiny_bundle, tokenizer, labelled=folder)


def test_labels_file_selects_and_numbers_labels(tiny_bundle, tokenizer, folder):
    """Images whose caption is not a label are left out. The order of the list numbers the
    labels."""
    captions = "wide.jpg, dog\ntall.jpg, cat\ngrey.jpg, a cat, on a mat\nsmall.png,dog\nx.png, cat"
    data = labelled(tiny_bundle, tokenizer, folder, captions, "owl\ndog\n\ncat\n")
    found = data.labelled
    files = ["small.png", "tall.jpg", "wide.jpg"]
    want = np.stack([preprocess(folder / f, tiny_bundle.manifest.image) for f in files])
    assert np.array_equal(np.concatenate(found.images), want)
    assert list(found.truth) == [1, 2, 1]
    assert found.templates == 2
    texts = [t.replace("{}", label) for label in ("owl", "dog", "cat") for t in TEMPLATES]
    assert np.array_equal(np.concatenate(found.texts), tokenizer(texts))
    assert data.source == "synthetic probes"


def test_captions_are_the_labels_without_a_labels_file(tiny_bundle, tokenizer, folder):
    """The captions are then the labels, in alphabetical order."""
    found = labelled(
        tiny_bundle, tokenizer, folder, "wide.jpg, dog\ntall.jpg, cat\ngrey.jpg, dog"
    ).labelled
    assert list(found.truth) == [1, 0, 1]  # the order is grey, tall, wide
    assert sum(map(len, found.texts)) == 2 * len(TEMPLATES)


def test_unreadable_labeled_images_are_skipped_with_their_label(tiny_bundle, tokenizer, folder):
    (folder / "print.jpg").write_bytes(b"no picture")
    data = labelled(
        tiny_bundle, tokenizer, folder, "grey.jpg, a\nprint.jpg, b\ntall.jpg, c\nwide.jpg, a"
    )
    assert list(data.labelled.truth) == [0, 2, 0]
    assert len(np.concatenate(data.labelled.images)) == 3
    (reason,) = data.skipped
    assert reason.startswith("print.jpg: ")


def test_unreadable_labeled_images_only_are_rejected(tiny_bundle, tokenizer, folder):
    (folder / "print.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of its images can be read; first print\.jpg: "):
        labelled(tiny_bundle, tokenizer, folder, "print.jpg, dog\n")


@pytest.mark.parametrize(
    ("captions", "labels", "count"),
    [("wide.jpg, dog", "cat\nowl", 2), ("", None, 0), ("wide.jpg dog", None, 0), ("x,y", "", 0)],
)
def test_labels_that_match_no_image_are_rejected(
    tiny_bundle, tokenizer, folder, captions, labels, count
):
    expected = rf"no image has one of its {count} labels as its caption; expected captions\.txt"
    with pytest.raises(InputError, match=expected):
        labelled(tiny_bundle, tokenizer, folder, captions, labels)


def test_directory_without_captions_file_has_no_captions(folder):
    assert read_captions(folder) == {}


def test_find_images_is_sorted_and_recursive(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "wide.jpg").rename(folder / "deep" / "er" / "wide.JPeG")
    found = [path.relative_to(folder).as_posix() for path in find_images(folder).files]
    assert found == sorted(found)
    assert "deep/er/wide.JPeG" in found
    assert len(found) == 8


def test_all_line_endings_are_accepted(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeffone\r\n two \r\n\r\nthree".encode())
    assert read_lines(file) == ["one", "two", "three"]
