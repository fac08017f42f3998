"""Files that are found in a directory. `find_images` itself is tested with the data sets."""

import glob
import os
from pathlib import Path

import pytest
from PIL import Image

from serving.errors import InputError
from serving.limits import FORMATS
from serving.util.directories import SUFFIXES, Pattern, find_images, walk


def test_links_and_pipes_are_reported(tmp_path):
    """Pipes could block, links to directories could repeat files."""
    inner = tmp_path / "album.jpg"
    inner.mkdir()
    (inner / "b.jpg").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "linked.jpg").symlink_to(inner / "b.jpg")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "again.jpg").symlink_to(inner)
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    found = find_images(tmp_path)
    assert found.files == [inner / "b.jpg", tmp_path / "linked.jpg"]
    assert {Path(item.path).name: item.reason for item in found.skipped} == {
        "gone.png": "is a link to a file that does not exist",
        "pipe.jpg": "is a pipe, not a file",
        "round.jpg": "is a link that leads to itself",
    }
    assert found.ignored == {".txt": 1, "links to directories": 2}
    kinds = {item.name: item.kind for item in walk(tmp_path)}
    assert kinds.pop("loop") == kinds.pop("again.jpg") == "linked directory"
    assert set(kinds.values()) == {"file"}


def test_unlistable_directory_is_rejected(tmp_path):
    with pytest.raises(InputError, match="absent cannot be listed"):
        list(walk(tmp_path / "absent"))


def test_suffixes_are_those_of_pillow():
    extensions = Image.registered_extensions()
    expected = {suffix for suffix, name in extensions.items() if name in FORMATS}
    assert set(SUFFIXES) == expected


def test_files_of_the_jpeg_family_are_images(tmp_path):
    for name in ("a.jfif", "b.JPE", "c.heic", "d", "e.txt", "captions.txt"):
        (tmp_path / name).touch()
    found = find_images(tmp_path)
    assert [file.name for file in found.files] == ["a.jfif", "b.JPE"]
    assert found.ignored == {".heic": 1, "": 1, ".txt": 1}


def test_directories_that_cannot_be_listed_are_reported(tmp_path):
    """The path of the innermost directory is longer than the system calls take."""
    (tmp_path / "a.jpg").touch()
    directory = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=directory)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    found = find_images(tmp_path)
    assert found.files == [tmp_path / "a.jpg"]
    (skipped,) = found.skipped
    assert Path(skipped.path).name == "d" * 250
    assert "cannot be listed" in skipped.reason


TREE = (
    "photos [2024]/a.jpg",
    "photos [2024]/img[1].jpg",
    "photos [2024]/img1.jpg",
    "photos 2/b.jpg",
    "data/x/1.tar",
    "data/x/y/2.tar",
    "data/.hidden/3.tar",
    "data/.4.tar",
)


@pytest.mark.parametrize(
    "pattern",
    [
        *("photos [2]/*.jpg", "photos */*.jpg", "data/*/*.tar", "data/**/*.tar", "data/**"),
        *("data/x/?.tar", "**/[12].tar", "data/.*/*.tar", "data/.*.tar", "*/x/**/2.tar"),
        *("nowhere/*.tar", "data/x/1.tar/*", "*"),
    ],
)
def test_patterns_match_as_in_a_shell(tmp_path, pattern):
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = Pattern(str(tmp_path / pattern))
    matches = {found.root / item.name for item in found.walk()}
    expected = glob.glob(str(tmp_path / pattern), recursive=True)  # noqa: PTH207
    assert matches == {Path(match) for match in expected if Path(match).is_file()}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos [2024]/*.jpg", ["a.jpg", "img1.jpg", "img[1].jpg"]),
        ("photos [2024]/img[1].jpg", ["img[1].jpg"]),
        ("photos [2024]/img[12].jpg", ["img1.jpg"]),
    ],
)
def test_names_that_exist_win_over_patterns(tmp_path, pattern, expected):
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    path = tmp_path / pattern
    if not path.exists():  # callers look for an existing path first
        assert [item.name for item in Pattern(str(path)).walk()] == expected
    else:
        assert Pattern(str(path)).root == path
