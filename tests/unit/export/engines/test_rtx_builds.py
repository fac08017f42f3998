"""Plans really built by TensorRT-RTX, which needs no GPU; on a GPU, plans of both libraries run.

Without a GPU no plan can be loaded: what is read back is the network that the library parsed, the
profiles that it took, and what its runtime says of a plan's header.
"""

import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.checkpoints.load import load_checkpoint
from export.engines.builder import EngineOptions, _read_cache, _write_cache, build_plan, profiles_of
from export.engines.bundle_engines import add_engines
from export.gate.datasets import probe_images, probe_texts, probes
from export.gate.parity import Expected, expect, judge
from export.gate.torch_runners import EagerRunner
from export.graphs.onnx_export import export_onnx
from export.int8.qdq import layers, quantise
from export.int8.ranges import activation_ranges
from export.int8.sensitivity import activations
from export.towers.clip import for_inference, half_precision
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.engine_facts import Engine
from serving.bundles.manifest import TOWERS, Artifact, Manifest
from serving.errors import ExportError, InputError, RunnerError
from serving.runners.registry import missing, open_runner
from serving.runners.tensor_rt import TensorRtRunner, collecting
from serving.util.files import sha256_of
from serving.util.progress import silent
from tests.support.paths import CHECKOUT
from tests.support.references import some_ids, some_pixels

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="no TensorRT-RTX: make setup")

PRECISIONS = ("fp32", "fp16", "int8", "int8-fp16")
BOUNDARY = {
    "image": ("pixels", "UINT8", "image_embeds"),
    "text": ("input_ids", "INT32", "text_embeds"),
}
OPTIONS = EngineOptions(library="tensorrt-rtx")
SLOWEST_S = 60


def write_int8(graph: Path, target: Path, manifest: Manifest) -> None:
    """Quantise `graph` with the ranges of one small batch: that it builds is all that counts."""
    model = onnx.load(graph)
    image = graph.name.startswith("image")
    batch = probe_images(manifest.image, 2) if image else probe_texts(manifest.text, 2, 16)
    names = activations(layers(model))
    ranges = activation_ranges(model, names, [batch], "minmax", lambda: None)
    onnx.save(quantise(model, ranges), target)


@pytest.fixture(scope="session")
def every_bundle(tiny_bundle, tmp_path_factory) -> Bundle:
    """The tiny bundle with int8-fp16 graphs as well; do not change it."""
    path = tmp_path_factory.mktemp("every") / "tiny-clip"
    shutil.copytree(tiny_bundle.path, path, copy_function=os.link)
    manifest, more = tiny_bundle.manifest, []
    for tower in TOWERS:
        target = path / f"{tower}.int8-fp16.onnx"
        write_int8(path / f"{tower}.fp16.onnx", target, manifest)
        files = (describe_file(target),)
        more.append(Artifact(tower=tower, kind="onnx", precision="int8-fp16", files=files))
    manifest = replace(manifest, artifacts=(*manifest.artifacts, *more))
    (path / "manifest.json").unlink()  # and with it the link
    (path / "manifest.json").write_text(manifest.to_json())
    return Bundle.open(path)


class Graph(NamedTuple):
    """What a plan is built of."""

    path: Path
    tower: str
    manifest: Manifest


def graph_of(bundle: Bundle, tower: str, precision: str) -> Graph:
    return Graph(bundle.verified(bundle.artifact(tower, precision)), tower, bundle.manifest)


def built(
    graph: Graph, options: EngineOptions = OPTIONS, progress: Any = silent
) -> tuple[bytes, Engine]:
    sha256 = sha256_of(graph.path) if graph.path.is_file() else ""
    return build_plan(graph.path, sha256, graph.tower, graph.manifest, options, progress)


def diagnostics(plan: bytes) -> int:
    """What the runtime holds against a plan, apart from there being no GPU for it."""
    runtime = rtx.Runtime(collecting(rtx, deque()))
    return runtime.get_engine_validity(plan)[1]


def assert_sound(graph: Graph, plan: bytes, engine: Engine) -> None:
    faults = rtx.EngineInvalidityDiagnostics
    assert not diagnostics(plan) & int(faults.MALFORMED_ENGINE)
    assert not diagnostics(plan) & int(faults.VERSION_MISMATCH)
    name, _, output = BOUNDARY[graph.tower]
    assert name.encode() in plan
    assert output.encode() in plan
    assert (engine.library, engine.version) == ("tensorrt-rtx", rtx.__version__)
    assert (engine.device, engine.compute_capability) == (None, None)
    assert engine.onnx_sha256 == sha256_of(graph.path)
    assert engine.profiles == profiles_of(graph.tower, graph.manifest, 64)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiny_plans(every_bundle, tower, precision):
    graph = graph_of(every_bundle, tower, precision)
    plan, engine = built(graph)
    assert_sound(graph, plan, engine)
    assert engine.build_seconds < SLOWEST_S


def test_what_is_no_plan_is_found_out():
    """So that `assert_sound` can fail."""
    assert diagnostics(b"no plan" * 100) & int(rtx.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


LARGE = [("image", "fp16"), ("image", "int8"), ("text", "fp16"), ("text", "int8-fp16")]
"""INT8 beside either precision; every other graph costs ten seconds of exporting."""


@pytest.fixture(scope="session")
def large(tmp_path_factory, tiny_bundle, vocabulary) -> dict[tuple[str, str], Graph]:
    """Graphs of the size of ViT-B/32, its weights random."""
    checkpoint = load_checkpoint("random:ViT-B-32", vocabulary=vocabulary)
    folder = tmp_path_factory.mktemp("large")
    manifest = replace(tiny_bundle.manifest, image=checkpoint.image, text=checkpoint.text)
    files = {(t, p): folder / f"{t}.{p}.onnx" for t, p in [*LARGE, ("image", "fp32")]}
    export_onnx(for_inference(checkpoint.clip.image), files["image", "fp32"], {})
    export_onnx(half_precision(checkpoint.clip.image), files["image", "fp16"], {})
    export_onnx(half_precision(checkpoint.clip.text), files["text", "fp16"], {})
    write_int8(files["image", "fp32"], files["image", "int8"], manifest)
    write_int8(files["text", "fp16"], files["text", "int8-fp16"], manifest)
    return {(t, p): Graph(file, t, manifest) for (t, p), file in files.items()}


@pytest.mark.skipif(
    "CLIP_SOAK" not in os.environ, reason="takes a minute and a half; make soak builds them"
)
@pytest.mark.parametrize(("tower", "precision"), LARGE)
def test_vit_b_32_plans(large, tower, precision):
    graph = large[tower, precision]
    plan, engine = built(graph)
    assert_sound(graph, plan, engine)
    megabytes = len(plan) / 1e6
    print(f"ViT-B/32 {tower} {precision}: {megabytes:.0f} MB in {engine.build_seconds} s")
    assert engine.build_seconds < SLOWEST_S
    # Weights are kept in what the graph has them in, not in float32.
    assert megabytes < 1.3 * graph.path.stat().st_size / 1e6


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_boundary_of_the_parsed_network(every_bundle, tower, precision):
    """Whatever the precision inside: uint8 or int32 in, float32 out, batch and length dynamic."""
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    typed = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = rtx.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph_of(every_bundle, tower, precision).path))
    assert (network.num_inputs, network.num_outputs) == (1, 1)
    given, made = network.get_input(0), network.get_output(0)
    name, dtype, output = BOUNDARY[tower]
    assert (given.name, given.dtype) == (name, getattr(rtx.DataType, dtype))
    assert tuple(given.shape) == ((-1, 3, 32, 32) if tower == "image" else (-1, -1))
    assert (made.name, made.dtype) == (output, rtx.DataType.FLOAT)
    assert tuple(made.shape) == (-1, every_bundle.manifest.embed_dim)


@pytest.fixture
def seen(monkeypatch) -> dict[str, Any]:
    """What the library itself holds when it starts to build."""
    seen: dict[str, Any] = {"profiles": []}

    class Builder(rtx.Builder):
        def create_optimization_profile(self):
            seen["profiles"].append(super().create_optimization_profile())
            return seen["profiles"][-1]

        def build_serialized_network(self, network, config):
            seen["typed"] = network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            seen["flags"] = {
                name for name, flag in rtx.BuilderFlag.__members__.items() if config.get_flag(flag)
            }
            seen["workspace"] = config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE)
            seen["level"] = config.builder_optimization_level
            seen["verbosity"] = config.profiling_verbosity
            seen["taken"] = config.num_optimization_profiles
            return super().build_serialized_network(network, config)

    library = SimpleNamespace(**vars(rtx) | {"Builder": Builder})
    monkeypatch.setattr("export.engines.builder.load_library", lambda _: library)
    return seen


@pytest.mark.parametrize(("tower", "max_batch"), [("image", 64), ("text", 64), ("text", 4)])
def test_what_the_library_is_told(every_bundle, seen, tower, max_batch):
    options = replace(OPTIONS, max_batch=max_batch, workspace_bytes=1 << 30, optimization_level=2)
    _, engine = built(graph_of(every_bundle, tower, "fp16"), options)
    name = BOUNDARY[tower][0]
    shapes = [tuple(map(tuple, profile.get_shape(name))) for profile in seen["profiles"]]
    assert shapes == [(p.minimum, p.optimum, p.maximum) for p in engine.profiles]
    assert seen["taken"] == len(shapes) == (1 if tower == "image" else 2)
    assert shapes[-1][-1][0] == max_batch
    assert seen["typed"]
    assert "TF32" in seen["flags"]
    assert not seen["flags"] & {"FP16", "INT8", "BF16", "STRIP_PLAN", "VERSION_COMPATIBLE"}
    assert (seen["workspace"], seen["level"]) == (1 << 30, 2)
    assert seen["verbosity"] == rtx.ProfilingVerbosity.DETAILED


# Graphs that cannot be built.


def unknown_operator(model: onnx.ModelProto) -> str:
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type = "Nonsense"
    return node.name


def other_width(model: onnx.ModelProto) -> str:
    """A weight that lost some of its rows."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights)
    weight = weights[node.input[1]]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:-3], weight.name))
    return node.name


def mixed_types(model: onnx.ModelProto) -> str:
    """float16 meets float32, which a strongly typed network does not mend."""
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    product = next(n for n in reversed(model.graph.node) if n.op_type == "MatMul")
    cast = onnx.helper.make_node("Cast", [product.input[0]], ["mixed"], "mixed_cast", to=full)
    product.input[0] = "mixed"
    model.graph.node.insert(list(model.graph.node).index(product), cast)
    assert half in {tensor.data_type for tensor in model.graph.initializer}
    return product.name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unknown_operator, "(Nonsense): "),
        (other_width, "must match"),
        (mixed_types, "must have same input types"),
    ],
)
def test_a_node_that_cannot_be_parsed(tiny_bundle, tmp_path, change, reason):
    graph = graph_of(tiny_bundle, "image", "fp16")
    model = onnx.load(graph.path)
    name = change(model)
    assert name
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ExportError) as refused:
        built(graph._replace(path=tmp_path / "broken.onnx"))
    said = str(refused.value)
    assert said.startswith(f"tensorrt-rtx {rtx.__version__} cannot parse {tmp_path}/broken.onnx: ")
    assert f"node {name} (" in said
    assert reason in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda graph: b"hello", "there is no graph in it"),
        (lambda graph: b"", "there is no graph in it"),
        (lambda graph: graph[: len(graph) // 2], "Failed to parse the ONNX model"),
        (None, "Input file cannot be found"),
    ],
    ids=["another file", "empty", "cut off", "not there"],
)
def test_a_file_that_is_no_graph(tiny_bundle, tmp_path, content, reason):
    graph = graph_of(tiny_bundle, "image", "fp16")
    path = tmp_path / "broken.onnx"
    if content:
        path.write_bytes(content(graph.path.read_bytes()))
    with pytest.raises(ExportError, match=f"cannot parse {path}: .*{reason}"):
        built(graph._replace(path=path))


def test_a_graph_with_another_input(tiny_bundle):
    graph = graph_of(tiny_bundle, "image", "fp16")._replace(tower="text")
    with pytest.raises(
        ExportError, match=r"cannot build .*image\.fp16\.onnx: .* input tensor pixels is missing"
    ):
        built(graph)


def test_too_little_workspace(tiny_bundle):
    with pytest.raises(ExportError, match=r"cannot build .* workspace limit"):
        built(graph_of(tiny_bundle, "text", "fp16"), replace(OPTIONS, workspace_bytes=1 << 10))


def test_a_broken_graph_leaves_nothing_in_the_bundle(tiny_bundle, tmp_path):
    """Though the manifest vouches for it: an exporter may have made it so."""
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, path, copy_function=os.link)
    model = onnx.load(path / "image.fp16.onnx")
    unknown_operator(model)
    for name in ("image.fp16.onnx", "manifest.json"):
        (path / name).unlink()
    onnx.save(model, path / "image.fp16.onnx")
    files = (describe_file(path / "image.fp16.onnx"),)
    artifacts = tuple(
        replace(a, files=files) if a.file == "image.fp16.onnx" else a
        for a in tiny_bundle.manifest.artifacts
    )
    text = replace(tiny_bundle.manifest, artifacts=artifacts).to_json()
    (path / "manifest.json").write_text(text)
    before = sorted(path.rglob("*"))
    with pytest.raises(ExportError, match=r"cannot parse .*image\.fp16\.onnx: node "):
        add_engines(Bundle.open(path), ["fp16"], OPTIONS, silent)
    assert sorted(path.rglob("*")) == before
    assert (path / "manifest.json").read_text() == text


# Progress, interruption, timing cache.


def test_progress_progresses(tiny_bundle):
    steps: list[tuple[str, int, int]] = []

    def progress(step: str, done: int = 0, total: int = 0) -> None:
        steps.append((step, done, total))

    built(graph_of(tiny_bundle, "text", "fp16"), progress=progress)
    phases = list(dict.fromkeys(step for step, _, _ in steps))
    assert len(phases) >= 2
    for phase in phases:
        name, _, what = phase.partition(": ")
        assert name == "text.fp16.onnx"
        assert what
        done = [d for step, d, _ in steps if step == phase]
        (total,) = {t for step, _, t in steps if step == phase}
        assert 1 <= done[0] <= done[-1] <= total
        # A phase that was finished may come again; else it only goes on.
        assert all(late > early or late == 1 for early, late in itertools.pairwise(done))
    assert max(total for _, _, total in steps) > 50  # more than a light going on and off


def after(calls: int, then: Callable[[], None]) -> Callable[..., None]:
    """A progress that does something else once, `calls` steps from the start."""
    left = calls

    def progress(step: str, done: int = 0, total: int = 0) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            then()

    return progress


def test_ctrl_c_ends_a_build(tiny_bundle):
    program = ["-m", "tests.support.interrupted_builds"]
    command = [sys.executable, "-X", "faulthandler", *program, str(tiny_bundle.path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_error_of_the_progress_is_raised(tiny_bundle):
    def fail() -> None:
        raise BrokenPipeError("nobody reads this")

    with pytest.raises(BrokenPipeError, match="nobody reads this"):
        built(graph_of(tiny_bundle, "image", "fp16"), progress=after(3, fail))


def test_a_build_in_another_thread(tiny_bundle):
    """Where no signal handler may be set."""
    made: list[bytes] = []
    graph = graph_of(tiny_bundle, "image", "fp16")
    thread = threading.Thread(target=lambda: made.append(built(graph)[0]))
    thread.start()
    thread.join(SLOWEST_S)
    assert made


@pytest.fixture
def config() -> Any:
    """Of a builder: TensorRT-RTX has the timing caches of TensorRT, and puts nothing into them."""
    builder = rtx.Builder(rtx.Logger(rtx.Logger.INTERNAL_ERROR))
    return builder.create_builder_config()


no_ops = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")


@no_ops
@pytest.mark.parametrize("content", [None, b"", b"of something else entirely" * 10])
def test_a_timing_cache_is_written(config, tmp_path, content):
    """Whatever was in the file."""
    file = tmp_path / "new" / "kernels.timing"
    if content is not None:
        file.parent.mkdir()
        file.write_bytes(content)
    cache = _read_cache(config, file)
    assert isinstance(cache, rtx.ITimingCache)
    _write_cache(cache, file, silent)
    written = file.read_bytes()
    assert written not in (b"", content)
    assert _read_cache(config, file) is not None
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_no_timing_cache(config):
    assert _read_cache(config, None) is None
    _write_cache(None, None, silent)


@no_ops
def test_a_timing_cache_that_cannot_be_written(config, tmp_path):
    """The plan is kept: it took longer."""
    (tmp_path / "file").write_text("no folder")
    file, said = tmp_path / "file" / "kernels.timing", []
    _write_cache(_read_cache(config, file), file, said.append)
    assert said == [f"kernel times are not kept: {file}: File exists"]


def test_a_timing_cache_that_cannot_be_read(config, tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); name another file"):
        _read_cache(config, tmp_path)


# On a GPU.

MAX_BATCH = 8
BATCHES = {
    "image": [some_pixels(n, 32, seed=n) for n in (1, 3, 8, 9, 21)],
    "text": [
        some_ids([1], 2),
        some_ids([3, 30, 9], 32),
        some_ids([3, 32, 9], 33),
        some_ids([3, 30, 76, 9, 1], 77),
        some_ids(list(range(1, 20)), 24),
        some_ids(list(range(1, 12)), 48),
    ],
}
"""Some larger than MAX_BATCH, lengths on both sides of what the two profiles meet at."""


def with_plans(bundle: Bundle, path: Path, precisions: tuple[str, ...], **options: Any) -> Bundle:
    shutil.copytree(bundle.path, path, copy_function=os.link)
    facts = EngineOptions(max_batch=MAX_BATCH, **options)
    if facts.library == "tensorrt":
        facts = replace(facts, timing_cache=path.parent / "kernels.timing")
    said: list[str] = []

    def progress(step: str, done: int = 0, total: int = 0) -> None:
        said.append(step)

    made = add_engines(Bundle.open(path), precisions, facts, progress)
    unjudged = [step for step in said if step.startswith("no verdict on")]
    if unjudged and facts.library == "tensorrt-rtx":
        pytest.skip(f"TensorRT-RTX does not run here: {unjudged[0]}")
    assert not unjudged
    return made


@pytest.fixture(scope="session", params=["tensorrt", "tensorrt-rtx"])
def gpu_bundle(request, every_bundle, tmp_path_factory) -> tuple[str, Bundle]:
    """A library, and the tiny bundle with a plan of every graph."""
    if reason := missing(f"{request.param}:fp16"):
        pytest.skip(f"{request.param}: {reason}")
    path = tmp_path_factory.mktemp(request.param) / "bundle"
    return request.param, with_plans(every_bundle, path, PRECISIONS, library=request.param)


@pytest.fixture(scope="session")
def expected(tiny_checkpoint) -> dict[str, Expected]:
    """Eager float32's embeddings, of the gate's probes and of BATCHES."""
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    found = {}
    for tower, module in (("image", checkpoint.clip.image), ("text", checkpoint.clip.text)):
        with EagerRunner(module) as eager:
            batches = [*probes(tower, checkpoint.image, checkpoint.text), *BATCHES[tower]]
            found[tower] = expect(eager, batches, None)
    return found


def precision_of(name: str) -> str:
    """`fp32` graphs run in TF32."""
    return "tf32" if name == "fp32" else name


@pytest.mark.gpu
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_parity(gpu_bundle, expected, tower, precision):
    library, bundle = gpu_bundle
    name = f"{library}:{precision_of(precision)}"
    with open_runner(bundle, tower, name) as runner:
        verdict = judge(runner, expected[tower], tower)
    print(f"{tower} {name}: cosine {verdict.min_cosine:.6f}")
    assert verdict.passed, verdict
    # The verdict that was recorded when the plan was built says the same.
    (plan,) = bundle.plans(tower, precision, library)
    assert plan.passed(name)


def other_contents(batch: np.ndarray, turn: int) -> np.ndarray:
    """Of the same shape; the embeddings are 0.15 and more away."""
    if batch.dtype == np.uint8:
        return np.roll(batch, 7 * turn, axis=3)
    return np.where(batch < 49406, (batch + 997 * turn) % 49406, batch).astype(np.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_replayed_graph_equals_plain_execution(gpu_bundle, tower, precision):
    """Each shape several times, so that it is run, captured and replayed, others in between."""
    library, bundle = gpu_bundle
    order = [*range(len(BATCHES[tower]))] * 5
    random.Random(0).shuffle(order)
    with (
        TensorRtRunner(bundle, tower, library, precision, graphs=False) as plain,
        TensorRtRunner(bundle, tower, library, precision, graphs=True) as replayed,
    ):
        for turn, number in enumerate(order):
            batch = other_contents(BATCHES[tower][number], turn)
            want, got = plain.run(batch), replayed.run(batch)
            assert got.shape == want.shape == (len(batch), bundle.manifest.embed_dim)
            np.testing.assert_allclose(got, want, atol=0.02)
        shapes = [runner._loaded._shapes for runner in (plain, replayed)]
        assert [any(s.graph is not None for s in every.values()) for every in shapes] == [
            False,
            True,
        ]
        assert all(s.graph is not None for s in shapes[1].values())
        assert max(shape[0] for shape in shapes[1]) == MAX_BATCH


@pytest.mark.gpu
@pytest.mark.parametrize("tower", TOWERS)
def test_shapes_that_were_dropped_come_back(gpu_bundle, tower, monkeypatch):
    library, bundle = gpu_bundle
    with TensorRtRunner(bundle, tower, library, "fp16") as runner:
        want = [runner.run(batch) for batch in BATCHES[tower]]
        monkeypatch.setattr("serving.runners.tensor_rt.MOST_SHAPES", 2)
        for _ in range(3):
            for batch, embeddings in zip(BATCHES[tower], want, strict=True):
                for _ in range(3):
                    np.testing.assert_allclose(runner.run(batch), embeddings, atol=0.02)


@pytest.mark.gpu
def test_a_results_memory_is_its_own(gpu_bundle):
    library, bundle = gpu_bundle
    with TensorRtRunner(bundle, "text", library, "fp16") as runner:
        batch = BATCHES["text"][3]
        for _ in range(3):
            first = runner.run(batch)
            kept = first.copy()
            runner.run(batch[::-1])
            assert np.array_equal(first, kept)
    assert np.array_equal(first, kept)


@pytest.mark.gpu
def test_a_batch_that_the_plan_does_not_take(gpu_bundle):
    library, bundle = gpu_bundle
    with TensorRtRunner(bundle, "text", library, "fp16") as runner:
        with pytest.raises(RunnerError, match=r"cannot run int32 \[1, 78\]: the plan takes shapes"):
            runner.run(np.ones((1, 78), np.int32))
        with pytest.raises(RunnerError, match="expected int32, got int64"):
            runner.run(np.ones((1, 8), np.int64))
        assert runner.run(BATCHES["text"][0]).shape == (1, bundle.manifest.embed_dim)
    with pytest.raises(RunnerError, match="is not open"):
        runner.run(BATCHES["text"][0])


@pytest.mark.gpu
def test_a_closed_runner_holds_no_memory(gpu_bundle):
    from cuda.bindings import runtime as cudart

    library, bundle = gpu_bundle
    free = []
    for _ in range(4):
        with TensorRtRunner(bundle, "image", library, "fp16") as runner:
            for batch in BATCHES["image"]:
                for _ in range(3):
                    runner.run(batch)
        free.append(cudart.cudaMemGetInfo()[1])
    assert free[0] - free[-1] < 32 << 20  # the first one also loads the library's own code


@pytest.mark.gpu
@pytest.mark.parametrize("fact", ["device", "compute_capability", "version", "onnx_sha256"])
def test_a_plan_from_elsewhere_is_refused(gpu_bundle, fact):
    library, bundle = gpu_bundle
    if library == "tensorrt-rtx" and fact in ("device", "compute_capability"):
        pytest.skip("plans of TensorRT-RTX belong to no device")
    (plan,) = bundle.plans("image", "fp16", library)
    value = {"compute_capability": "7.0", "version": "1.2.3"}.get(fact, "another")
    edited = replace(plan, engine=replace(plan.engine, **{fact: value}))
    artifacts = tuple(edited if a is plan else a for a in bundle.manifest.artifacts)
    elsewhere = Bundle(bundle.path, replace(bundle.manifest, artifacts=artifacts))
    with pytest.raises(RunnerError) as refused:
        TensorRtRunner(elsewhere, "image", library, "fp16").__enter__()
    said = str(refused.value)
    label = {"compute_capability": "device", "onnx_sha256": "graph"}.get(fact, fact)
    assert f"{plan.file}: {label}: " in said
    assert value in said
    command = f"python -m export engine {bundle.path} --engine {library} --precision fp16"
    assert said.endswith(f"Build it here: {command}")


@pytest.mark.gpu
@pytest.mark.skipif(missing("tensorrt:fp16") is not None, reason=str(missing("tensorrt:fp16")))
@pytest.mark.parametrize("option", ["strip_weights", "version_compatible", "hardware_compatible"])
def test_plans_of_other_kinds_compute_the_same(every_bundle, expected, tmp_path, option):
    whole = with_plans(every_bundle, tmp_path / "whole", ("fp16",))
    made = with_plans(every_bundle, tmp_path / "bundle", ("fp16",), **{option: True})
    for tower in TOWERS:
        with open_runner(made, tower, "tensorrt:fp16") as runner:
            assert judge(runner, expected[tower], tower).passed
    if option == "strip_weights":
        sizes = [b.plans("text", "fp16", "tensorrt")[0].files[0].bytes for b in (made, whole)]
        assert sizes[0] < sizes[1] / 2
