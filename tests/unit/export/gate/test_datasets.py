"""The data of an export: folders and files as users give them, good and bad."""

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
    """A folder of one's own, with the eight good pictures."""
    return Path(shutil.copytree(pictures, tmp_path / "folder"))


@pytest.fixture(scope="session")
def tokenizer(tiny_bundle) -> Tokenizer:
    return Tokenizer(tiny_bundle.tokenizer, tiny_bundle.manifest.text)


def load(bundle: Bundle, tokenizer: Tokenizer, **given):
    manifest = bundle.manifest
    return load_data(
        manifest.image, tokenizer, TEMPLATES, manifest.text, progress=lambda _: None, **given
    )


def test_without_data_the_probes_are_used_and_said_to_be(tiny_bundle, tokenizer):
    data, again = load(tiny_bundle, tokenizer), load(tiny_bundle, tokenizer)
    assert data.source == "synthetic probes"
    assert (data.labelled, data.skipped) == (None, ())
    for tower in ("image", "text"):
        assert len(data.calibration[tower]) > 1
        for one, other in zip(data.calibration[tower], again.calibration[tower], strict=True):
            assert np.array_equal(one, other)
    assert {batch.shape[1] for batch in data.calibration["text"]} == {8, 16, 24, 32, 48, 77}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_parity_probes_are_the_same_each_time_and_not_those_of_calibration(
    tiny_bundle, tokenizer, tower
):
    """INT8 that was calibrated on what it is judged by would be judged too kindly."""
    image, text = tiny_bundle.manifest.image, tiny_bundle.manifest.text
    one, two = (list(probes(tower, image, text)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    seen = {row.tobytes() for b in load(tiny_bundle, tokenizer).calibration[tower] for row in b}
    rows = [row for batch in one for row in batch]
    if tower == "text":  # an empty text is the same everywhere
        rows = [row for row in rows if row[1] != text.end_id]
    assert len(rows) >= 16
    assert not any(row.tobytes() in seen for row in rows)


def test_pictures_become_batches_in_the_order_of_their_names(tiny_bundle, tokenizer, folder):
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


def test_unreadable_pictures_are_named_and_the_rest_is_used(tiny_bundle, tokenizer, folder):
    (folder / "aaa.jpg").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.jpg").write_bytes((folder / "wide.jpg").read_bytes()[:300])
    (folder / "notes.md").write_text("not looked at")
    (folder / "a-folder.png").mkdir()  # no file, so no image either
    data = load(tiny_bundle, tokenizer, pictures=folder)
    assert sum(map(len, data.calibration["image"])) == 8
    assert data.source == "8 images of folder"
    named = [re.match(r"([\w.-]+): \S", reason)[1] for reason in data.skipped]
    assert named == ["aaa.jpg", "empty.png", "half.jpg"]


def test_a_build_says_how_many_pictures_it_skipped(tiny_bundle, tiny_checkpoint, folder, tmp_path):
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


def test_a_folder_of_nothing_but_unreadable_pictures(tiny_bundle, tokenizer, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of its images can be read; first bad\.jpg: "):
        load(tiny_bundle, tokenizer, pictures=tmp_path)


def test_an_empty_folder(tiny_bundle, tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(InputError, match=r"no images in .*; expected files of \.jpg, "):
        load(tiny_bundle, tokenizer, pictures=tmp_path)


def test_a_folder_that_is_not_there_or_a_file(tiny_bundle, tokenizer, tmp_path):
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


def test_many_and_long_captions(tiny_bundle, tokenizer, tmp_path):
    file = tmp_path / "many.txt"
    file.write_text("\n".join(["word " * 200] + [f"number {n}" for n in range(1000)]))
    data = load(tiny_bundle, tokenizer, captions=file)
    assert sum(map(len, data.calibration["text"])) == CALIBRATION_TEXTS
    assert data.calibration["text"][0].shape == (16, 77)
    assert data.calibration["text"][1].shape == (16, 8)


def test_captions_that_are_not_utf8(tiny_bundle, tokenizer, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes("one\ntwo\nein schöner Hund\n".encode("latin-1"))
    with pytest.raises(TextError, match=r"captions\.txt, line 3: not UTF-8 .*save the file as UTF"):
        load(tiny_bundle, tokenizer, captions=file)


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_captions_without_a_caption(tiny_bundle, tokenizer, tmp_path, content):
    file = tmp_path / "captions.txt"
    file.write_text(content)
    with pytest.raises(InputError, match=r"captions\.txt has no captions; expected one per line"):
        load(tiny_bundle, tokenizer, captions=file)


def test_captions_that_are_not_there(tiny_bundle, tokenizer, tmp_path):
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InputError, match=rf"{path.name} cannot be read"):
            load(tiny_bundle, tokenizer, captions=path)


def labelled(tiny_bundle, tokenizer, folder, captions: str, labels: str | None = None):
    (folder / "captions.txt").write_text(captions)
    if labels is not None:
        (folder / "labels.txt").write_text(labels)
    return load(tiny_bundle, tokenizer, labelled=folder)


def test_labelled_pictures_with_a_list_of_labels(tiny_bundle, tokenizer, folder):
    """Pictures whose caption is no label are left out; the list's order is the labels' numbers."""
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


def test_labelled_pictures_without_a_list(tiny_bundle, tokenizer, folder):
    """Every caption is a label then, in the order of the alphabet."""
    found = labelled(
        tiny_bundle, tokenizer, folder, "wide.jpg, dog\ntall.jpg, cat\ngrey.jpg, dog"
    ).labelled
    assert list(found.truth) == [1, 0, 1]  # grey, tall, wide
    assert sum(map(len, found.texts)) == 2 * len(TEMPLATES)


def test_unreadable_labelled_pictures_are_skipped_with_their_label(tiny_bundle, tokenizer, folder):
    (folder / "print.jpg").write_bytes(b"no picture")
    data = labelled(
        tiny_bundle, tokenizer, folder, "grey.jpg, a\nprint.jpg, b\ntall.jpg, c\nwide.jpg, a"
    )
    assert list(data.labelled.truth) == [0, 2, 0]
    assert len(np.concatenate(data.labelled.images)) == 3
    (reason,) = data.skipped
    assert reason.startswith("print.jpg: ")


def test_labelled_pictures_of_which_none_can_be_read(tiny_bundle, tokenizer, folder):
    (folder / "print.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of its images can be read; first print\.jpg: "):
        labelled(tiny_bundle, tokenizer, folder, "print.jpg, dog\n")


@pytest.mark.parametrize(
    ("captions", "labels", "count"),
    [("wide.jpg, dog", "cat\nowl", 2), ("", None, 0), ("wide.jpg dog", None, 0), ("x,y", "", 0)],
)
def test_labels_that_match_no_picture(tiny_bundle, tokenizer, folder, captions, labels, count):
    expected = rf"no image has one of its {count} labels as its caption; expected captions\.txt"
    with pytest.raises(InputError, match=expected):
        labelled(tiny_bundle, tokenizer, folder, captions, labels)


def test_folders_without_captions_have_none(folder):
    assert read_captions(folder) == {}


def test_find_images_is_sorted_and_looks_into_folders(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "wide.jpg").rename(folder / "deep" / "er" / "wide.JPeG")
    found = [path.relative_to(folder).as_posix() for path in find_images(folder)]
    assert found == sorted(found)
    assert "deep/er/wide.JPeG" in found
    assert len(found) == 8


def test_lines_end_in_any_way(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeffone\r\n two \r\n\r\nthree".encode())
    assert read_lines(file) == ["one", "two", "three"]
