"""Files that are found in a directory. `find_images` itself is tested with the data sets."""

import os

import pytest

from serving.errors import InputError
from serving.util.directories import find_images, walk


def test_directory_links_and_pipes_are_skipped(tmp_path):
    """A dangling link is found, so that it is reported. Files that could block or repeat are
    skipped."""
    inner = tmp_path / "album.jpg"
    inner.mkdir()
    (inner / "b.jpg").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "linked.jpg").symlink_to(inner / "b.jpg")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "again.jpg").symlink_to(inner)
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "pipe.jpg")
    images = ["album.jpg/b.jpg", "gone.png", "linked.jpg"]
    assert list(walk(tmp_path)) == ["a.txt", *images]
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == images


def test_unlistable_directory_is_rejected(tmp_path):
    with pytest.raises(InputError, match="absent cannot be listed"):
        list(walk(tmp_path / "absent"))
