"""Shared fixtures: a tiny checkpoint made by transformers, its bundle, and images."""

import os

# Before torch, transformers and huggingface_hub are imported: they read these variables once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, len(os.sched_getaffinity(0)))))

import serving  # noqa: F401, I001  turns off the telemetry of libraries before they are imported

import fcntl
import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.references import VOCABULARY, randomise

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_terminal_summary(terminalreporter):
    """Print the figures that reliability tests measured. docs/reliability.md quotes them."""
    reports = [report for some in terminalreporter.stats.values() for report in some]
    reports = [report for report in reports if getattr(report, "when", None) == "teardown"]
    seen = [
        f"{promise}: {value}"
        for report in sorted(reports, key=lambda report: report.nodeid)
        for promise, value in (v for name, v in report.user_properties if name == "figure")
    ]
    if seen:
        terminalreporter.section("promises, and what was seen")
        terminalreporter.write("\n".join((*seen, "")))


@pytest.fixture
def figure(request):
    """`figure("isolation", "6,200 answers of 200 rounds bit-equal")`, printed after the run."""
    told = request.node.user_properties  # part of the report, also from other processes
    return lambda promise, seen: told.append(("figure", (promise, seen)))


@pytest.fixture(scope="session")
def vocabulary() -> Path:
    """OpenAI's BPE vocabulary, from the installed openai-clip."""
    return VOCABULARY


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`with once(name) as path:` a path that all processes of a run share, one at a time.

    The first process finds nothing there and creates it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)

    @contextmanager
    def locked(name):
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder / name

    return locked


@pytest.fixture(scope="session")
def tiny_checkpoint(once, vocabulary) -> Path:
    """A Hugging Face CLIP directory: 32 px images, 8 px patches, two layers and heads per tower."""
    with once("checkpoint") as folder:
        path = folder / "tiny-clip"
        if not path.exists():
            unfinished = folder / "unfinished"
            save_tiny_checkpoint(unfinished, vocabulary)
            unfinished.rename(path)
    return path


def save_tiny_checkpoint(path: Path, vocabulary: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from export.checkpoints.vocabulary import openai_tokenizer

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 49408, "max_position_embeddings": 77},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise(CLIPModel(config), seed=0)
    with torch.no_grad():
        model.logit_scale.fill_(np.log(20.0))
    model.save_pretrained(path)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(path)
    openai_tokenizer(vocabulary).save(str(path / "tokenizer.json"))
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}
    assert {file.name for file in path.iterdir()} == expected
    assert json.loads((path / "config.json").read_text())["model_type"] == "clip"


@pytest.fixture(scope="session")
def kept_graphs(once):
    """`export_onnx` that traces a tower once for all tests and processes of a run.

    For tests that need a graph and do not check how it is made.
    """
    from export.graphs.onnx_export import export_onnx

    def export(tower, path, metadata):
        key = hashlib.sha256(
            repr((tower, getattr(tower, "tower", tower).config, metadata)).encode()
        )
        for name, tensor in tower.state_dict().items():
            key.update(name.encode() + tensor.numpy().tobytes())
        with once(f"{key.hexdigest()}.onnx") as kept:
            if not kept.exists():
                assert export_onnx(tower, kept, metadata) == [kept]
        shutil.copyfile(kept, path)
        return [path]

    return export


@pytest.fixture(scope="session")
def quick_build(kept_graphs):
    """`quick_build(checkpoint, output, **options)`: build a bundle from `kept_graphs`."""
    import export.pipeline
    from export.checkpoints.load import load_checkpoint
    from serving.util.progress import silent

    def build(checkpoint, output, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export.pipeline, "export_onnx", kept_graphs)
            loaded = load_checkpoint(str(checkpoint))
            return export.pipeline.build(loaded, output, silent, export.pipeline.Options(**options))

    return build


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, quick_build, once):
    """The `Bundle` of the tiny checkpoint in fp32, fp16 and int8. Do not change it."""
    from serving.bundles.bundle import Bundle

    with once("tiny-clip") as path:
        return Bundle.open(path) if path.exists() else quick_build(tiny_checkpoint, path)


@pytest.fixture(scope="session")
def tree_bundle(tiny_checkpoint, quick_build, tmp_path_factory):
    """The tiny bundle in fp32 and int8, with the prefix-tree graphs of the text tower. Do not
    change it."""
    from export.precisions import Precision

    output = tmp_path_factory.mktemp("tree") / "tiny-clip"
    precisions = (Precision.FP32, Precision.INT8)
    return quick_build(tiny_checkpoint, output, precisions=precisions, prefix_tree=True)


@pytest.fixture(scope="session")
def fp32_bundle(tiny_bundle, tmp_path_factory):
    """The tiny bundle's float32 graphs only, which pass the gate quickly. Do not change it."""
    from serving.bundles.bundle import Bundle

    path = tmp_path_factory.mktemp("fp32") / "tiny-clip"
    artifacts = tuple(a for a in tiny_bundle.manifest.artifacts if a.precision == "fp32")
    names = {file.name for artifact in artifacts for file in artifact.files}
    path.mkdir()
    for name in (*names, "tokenizer.json"):
        (path / name).hardlink_to(tiny_bundle.path / name)
    manifest = replace(tiny_bundle.manifest, artifacts=artifacts)
    (path / "manifest.json").write_text(manifest.to_json())
    return Bundle.open(path)


@pytest.fixture(scope="session")
def unloadable_graph() -> bytes:
    """An ONNX graph that no runtime can run."""
    from onnx import TensorProto, helper

    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nobody")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([node], "unloadable", [x], [y])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A directory of image files of different sizes, formats and modes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size, mode in (
        ("wide.jpg", (97, 41), "RGB"),
        ("tall.jpg", (40, 111), "RGB"),
        ("grey.jpg", (64, 64), "L"),
        ("print.jpg", (50, 36), "CMYK"),
        ("small.png", (7, 5), "RGB"),
        ("palette.png", (45, 60), "P"),
        ("alpha.png", (80, 33), "RGBA"),
        ("stencil.png", (35, 35), "1"),
    ):
        grid = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
        picture = grid.resize(size, Image.Resampling.BICUBIC)
        if mode == "RGBA":
            picture.putalpha(Image.linear_gradient("L").resize(size))
        picture.convert(mode).save(folder / name)
    return folder
