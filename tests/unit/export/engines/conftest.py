"""Fixtures: bundles with engines, and bundles to build engines from."""

import os
import shutil
import sys
from dataclasses import replace
from typing import Any

import pytest

from export.__main__ import app
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.manifest import TOWERS, Artifact
from serving.cli.console import run
from tests.support.engine_builds import (
    write_int8,
)


@pytest.fixture
def command(monkeypatch, capfd):
    """Run `clip-deploy engine` in this process. Return exit code, output and error."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export", "engine", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(app)
        captured = capfd.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def every_bundle(tiny_bundle, tmp_path_factory) -> Bundle:
    """The tiny bundle with int8-fp16 graphs as well. Do not change it."""
    path = tmp_path_factory.mktemp("every") / "tiny-clip"
    shutil.copytree(tiny_bundle.path, path, copy_function=os.link)
    manifest, more = tiny_bundle.manifest, []
    for tower in TOWERS:
        target = path / f"{tower}.int8-fp16.onnx"
        write_int8(path / f"{tower}.fp16.onnx", target, manifest)
        files = (describe_file(target),)
        more.append(Artifact(graph=tower, kind="onnx", precision="int8-fp16", files=files))
    manifest = replace(manifest, artifacts=(*manifest.artifacts, *more))
    (path / "manifest.json").unlink()  # removes the hard link too
    (path / "manifest.json").write_text(manifest.to_json())
    return Bundle.open(path)


@pytest.fixture
def config() -> Any:
    """A builder's config. TensorRT-RTX accepts TensorRT's timing caches, but adds no entries to
    them."""
    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="no TensorRT-RTX: make setup")
    builder = rtx.Builder(rtx.Logger(rtx.Logger.INTERNAL_ERROR))
    return builder.create_builder_config()
