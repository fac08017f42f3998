"""Bundles with engines."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.engine_facts import Engine, Profile
from serving.bundles.manifest import Artifact
from serving.runners.tensor_rt import (
    library_version,
)
from serving.util.nvidia import Gpu, gpu

RTX = library_version("tensorrt-rtx")


needs_rtx = pytest.mark.skipif(RTX is None, reason="no TensorRT-RTX: make setup")


without_gpu = pytest.mark.skipif(gpu() is not None, reason="is about a machine without a GPU")


GRAPH = "a" * 64


H200 = Gpu(name="NVIDIA H200", compute_capability="9.0", memory_bytes=141 << 30, cuda="13.0")


PROFILE = Profile(minimum=(1, 3, 32, 32), optimum=(16, 3, 32, 32), maximum=(64, 3, 32, 32))


ENGINE = Engine(
    library="tensorrt",
    version="10.13.3.9",
    device=H200.name,
    compute_capability=H200.compute_capability,
    cuda="13.0",
    profiles=(PROFILE,),
    onnx_sha256=GRAPH,
    build_seconds=12.5,
    workspace_bytes=4 << 30,
    optimization_level=3,
)


RTX_ENGINE = replace(
    ENGINE, library="tensorrt-rtx", version="1.7.1.116", device=None, compute_capability=None
)


def copied(bundle: Bundle, path: Path) -> Bundle:
    """Copy a bundle to build into. Its files are hard links, so they must not be written to."""
    return Bundle.open(Path(shutil.copytree(bundle.path, path, copy_function=os.link)))


def with_plan(bundle: Bundle, path: Path, *engines: Engine, content=b"no plan at all") -> Bundle:
    """Copy a bundle and add fp16 engines of the image tower to its manifest. The engines cannot
    run."""
    copy = copied(bundle, path)
    graph = copy.artifact("image", "fp16")
    artifacts = list(copy.manifest.artifacts)
    for number, engine in enumerate(engines):
        file = copy.path / "engines" / str(number) / "image.fp16.plan"
        sidecar = file.with_name(file.name + ".json")
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        sidecar.write_text("{}")
        files = (describe_file(file, copy.path), describe_file(sidecar, copy.path))
        engine = replace(engine, onnx_sha256=graph.files[0].sha256)
        artifacts.append(
            Artifact(graph="image", kind="engine", precision="fp16", files=files, engine=engine)
        )
    manifest = replace(copy.manifest, artifacts=tuple(artifacts))
    (copy.path / "manifest.json").unlink()  # removes the hard link too
    (copy.path / "manifest.json").write_text(manifest.to_json())
    return Bundle(copy.path, manifest)
