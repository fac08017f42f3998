"""Which files of a directory are found: `find_images` itself is tested with the data sets."""

import os

import pytest

from serving.errors import InputError
from serving.util.directories import find_images, walk


def test_links_pipes_and_names_that_mislead(tmp_path):
    """A link that leads nowhere is found, to be reported; what could block or repeat is not."""
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


def test_a_directory_that_cannot_be_listed(tmp_path):
    with pytest.raises(InputError, match="absent cannot be listed"):
        list(walk(tmp_path / "absent"))
