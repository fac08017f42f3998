"""Fixtures: an embedder, and indexes of a directory of images."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from serving.clients.local import LocalClip
from serving.search.build import build
from tests.support.search_data import Counting, fill


@pytest.fixture(scope="module")
def clip(fp32_bundle):
    with Counting(fp32_bundle.path) as opened:
        yield opened


@pytest.fixture
def counted(clip):
    clip.embedded = 0
    return clip


@pytest.fixture(scope="module")
def other(fp32_bundle, tmp_path_factory):
    """A bundle whose manifest names other weights."""
    path = tmp_path_factory.mktemp("other") / "other-clip"
    shutil.copytree(fp32_bundle.path, path)
    manifest = fp32_bundle.manifest
    provenance = replace(manifest.provenance, weights_sha256="f" * 64)
    changed = replace(manifest, name="other-clip", provenance=provenance)
    (path / "manifest.json").write_text(changed.to_json())
    with LocalClip(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A directory with 40 images and three files that are not images. Do not change it."""
    return fill(tmp_path_factory.mktemp("photos"), 40)


@pytest.fixture(scope="module")
def built(folder, clip, tmp_path_factory) -> Path:
    """The exact index of `folder`. Do not change it."""
    path = tmp_path_factory.mktemp("indexes") / "photos.index"
    build(folder, path, clip)
    return path


@pytest.fixture
def index(built, tmp_path) -> Path:
    """A copy of `built` that tests may change."""
    return Path(shutil.copytree(built, tmp_path / "copy.index"))


@pytest.fixture
def photos(folder, tmp_path) -> Path:
    """A copy of `folder` that tests may change."""
    return Path(shutil.copytree(folder, tmp_path / "photos"))
