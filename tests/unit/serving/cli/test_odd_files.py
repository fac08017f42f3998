"""Files that are not ordinary images: bad ones, pipes, links, odd names, and other kinds."""

import json
import os
import shutil
import signal
import socket
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.clients.local import LocalClip

BYTES = os.fsdecode(b"caf\xe9.jpg")
MARKUP = "a[red]b[bold].jpg"
ESCAPES = "x\x1b[31mred\x1b]0;title\x07\n\u202egpj.jpg"
ODD = (BYTES, MARKUP, ESCAPES)


@pytest.fixture
def local(tiny_bundle):
    return "--bundle", tiny_bundle.path, "--runner", "onnxruntime:fp32"


@pytest.fixture(scope="module")
def image(pictures) -> bytes:
    return (pictures / "wide.jpg").read_bytes()


@pytest.fixture
def categories(tmp_path):
    file = tmp_path / "categories.toml"
    file.write_text('animal = ["cat", "dog"]\n')
    return file


@pytest.fixture
def odd(tmp_path, image) -> Path:
    """A directory with a good image, and everything that is not one."""
    root = tmp_path / "odd"
    (root / "below").mkdir(parents=True)
    (root / "good.jpg").write_bytes(image)
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "socket.jpg"))
    (root / "device.jpg").symlink_to("/dev/zero")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "gone.jpg").symlink_to("nowhere")
    (root / "again").symlink_to("below")
    for name in ("a.heic", "b.heic", "no suffix", "notes.txt", "captions.txt"):
        (root / name).write_bytes(b"")
    return root


NOT_FILES = {"pipe.jpg", "socket.jpg", "device.jpg", "loop.jpg", "gone.jpg"}
IGNORED = {".heic": 2, "": 1, ".txt": 1, "links to directories": 1}


@contextmanager
def at_once(seconds=60):
    """Fail if the block takes long, for example because it reads from a pipe."""

    def late(*_):
        raise AssertionError("blocked")  # not an OSError, which the commands would report

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def commands(categories):
    return {
        "embed": (),
        "classify": ("--label", "cat", "--label", "dog"),
        "rank": ("--text", "a cat", "--text", "a dog"),
        "caption": ("--categories", categories),
    }


COMMANDS = ("embed", "classify", "rank", "caption")


def images_of(found):
    return found["names"] if "names" in found else [one["image"] for one in found["images"]]


def unfolded(table: str) -> str:
    """The first column of a table as one line: long names are folded over several lines."""
    rows = (line.split("│") for line in table.splitlines() if line.startswith("│"))
    return "".join(row[1].strip() for row in rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_other_files_are_never_opened_and_always_reported(run, local, odd, categories, command):
    options = (*commands(categories)[command], *local)
    with at_once():
        code, out, err = run(command, odd, *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert images_of(found) == [str(odd / "good.jpg")]
    assert {Path(item["path"]).name for item in found["skipped"]} == NOT_FILES
    assert found["ignored"] == IGNORED
    with at_once():
        code, out, err = run(command, odd, *options)
    assert (code, "good.jpg" in unfolded(out)) == (0, True)
    assert all(name in err for name in (*NOT_FILES, "2 .heic", "1 without a suffix"))


def test_search_reports_other_files(run, local, odd, tmp_path):
    with at_once():
        code, out, err = run("search", "build", odd, "--output", tmp_path / "i", *local, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["images"], found["ignored"]) == (1, IGNORED)
    assert {item["path"] for item in found["skipped"]} == NOT_FILES
    with at_once():
        code, _, err = run("search", "add", tmp_path / "i", odd / "pipe.jpg", *local)
        assert (code, "is a pipe" in err) == (2, True)
        code, _, err = run("search", "query", tmp_path / "i", "--image", odd / "pipe.jpg", *local)
        assert (code, "is a pipe" in err) == (2, True)
        code, _, err = run("search", "update", tmp_path / "i", *local)
        assert (code, "ignored 4 files that are not images" in err) == (0, True)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["pipe.jpg", "socket.jpg", "device.jpg", "loop.jpg", "gone.jpg"])
def test_explicit_names_that_are_not_files_are_errors(run, local, odd, categories, command, name):
    with at_once():
        code, out, err = run(command, odd / name, *commands(categories)[command], *local)
    assert (code, out) == (2, "")
    assert name in err


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_images_fail_or_are_skipped(run, local, tmp_path, image, categories, command):
    files = [tmp_path / name for name in ("a.jpg", "bad.jpg", "c.jpg", "empty.jpg")]
    for file in files:
        file.write_bytes(image)
    files[1].write_bytes(b"not an image")
    files[3].write_bytes(b"")
    absent = tmp_path / "absent.jpg"
    options = (*commands(categories)[command], *local, "--json")
    code, out, err = run(command, *files, *options)
    assert (code, out) == (2, "")
    assert "bad.jpg" in err
    assert "--on-error skip" in err
    code, out, err = run(command, *files, absent, *options, "--on-error", "skip")
    assert code == 0, err
    found = json.loads(out)
    assert images_of(found) == [str(files[0]), str(files[2])]
    assert {item["path"] for item in found["skipped"]} == {*map(str, (files[1], files[3], absent))}
    assert all(item["reason"] for item in found["skipped"])
    code, out, err = run(command, files[1], files[3], *options, "--on-error", "skip")
    assert (code, out) == (2, "")
    code, out, err = run(command, absent, *options, "--on-error", "skip")
    assert (code, out) == (2, "")


def test_skipped_images_do_not_shift_the_rows(run, tiny_bundle, local, tmp_path, pictures):
    files = []
    for number, file in enumerate(sorted(pictures.iterdir())):
        files.append(tmp_path / f"{number}{file.suffix}")
        shutil.copy(file, files[-1])
    for number in (0, 3, 4, 7):
        files[number].write_bytes(b"bad")
    output = tmp_path / "out.npz"
    code, _, err = run("embed", *files, *local, "--on-error", "skip", "--output", output)
    assert code == 0, err
    good = [file for number, file in enumerate(files) if number not in (0, 3, 4, 7)]
    with np.load(output) as saved, LocalClip(tiny_bundle.path, "onnxruntime:fp32") as clip:
        assert saved["names"].tolist() == list(map(str, good))
        np.testing.assert_allclose(saved["embeddings"], clip.embed_images(good), atol=1e-6)


@pytest.fixture
def oddly_named(tmp_path, image) -> Path:
    root = tmp_path / os.fsdecode(b"d\xefr")
    root.mkdir()
    for name in ODD:
        (root / name).write_bytes(image)
    return root


def assert_harmless(*texts):
    for text in texts:
        assert "\x1b[31m" not in text
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        text.encode()


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_names_are_printed_literally(run, local, oddly_named, categories, command):
    options = (*commands(categories)[command], *local)
    code, out, err = run(command, oddly_named, *options)
    assert code == 0, err
    assert_harmless(out, err)
    assert all(name in unfolded(out) for name in (MARKUP, r"caf\xe9.jpg", r"x\x1b[31mred"))
    code, out, err = run(command, oddly_named, *options, "--json")
    assert code == 0, err
    assert images_of(json.loads(out)) == sorted(str(oddly_named / name) for name in ODD)


def test_output_of_odd_names(run, local, oddly_named, tmp_path):
    output = tmp_path / os.fsdecode(b"\xe9.npz")
    code, out, err = run("embed", oddly_named, *local, "--output", output)
    assert code == 0, err
    assert r"wrote" in out
    assert r"\xe9.npz" in out
    with np.load(output) as saved:
        assert saved["names"].tolist() == sorted(str(oddly_named / name) for name in ODD)


def test_search_in_oddly_named_directories(run, local, oddly_named, tmp_path):
    index, sheet = tmp_path / os.fsdecode(b"\xe9.index"), tmp_path / os.fsdecode(b"\xe9.png")
    (oddly_named / os.fsdecode(b"bad\xe9\x1b.jpg")).write_bytes(b"")
    for arguments in (
        ("build", oddly_named, "--output", index, *local),
        ("query", index, "[/b] \x1b[31m", "--image", oddly_named / BYTES, "--sheet", sheet, *local),
        ("info", index),
        ("update", index, *local),
        ("add", index, oddly_named / BYTES, *local),
        ("remove", index, MARKUP),
        ("remove", index, BYTES),
    ):
        for json_option in ((), ("--json",)):
            if json_option and arguments[0] == "remove":
                continue
            code, out, err = run("search", *arguments, *json_option)
            assert code == 0, (arguments, err)
            assert_harmless(out, err)
    with Image.open(sheet) as drawn:
        assert drawn.format == "PNG"


def test_texts_and_titles_are_printed_literally(run, local, pictures):
    texts = "[/b] hi", "[link=x]y[/link]", "\x1b[31mred"
    options = [option for text in texts for option in ("--text", text)]
    code, out, err = run("embed", *options, *local)
    assert code == 0, err
    assert_harmless(out, err)
    assert all(text in out for text in (*texts[:2], r"\x1b[31mred"))
    question = ("--question", "[/b] is \x1b[31m", "--candidate", "[a]", "--candidate", "b\x07")
    code, out, err = run("answer", pictures / "wide.jpg", *question, *local)
    assert code == 0, err
    assert_harmless(out, err)
    assert all(text in out for text in (r"[/b] is \x1b[31m", "[a]", r"b\x07"))
