"""Assembly: the committed configurations, the facts of a bundle, and rejected artifacts."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.engine_facts import Engine, Profile
from serving.bundles.integrity import sealed, unsealed
from serving.bundles.manifest import Tower
from serving.errors import BundleError, ClipDeployError, RunnerError
from serving.runners import tensor_rt
from serving.triton.repository import (
    SOURCE,
    assemble,
    assembled_backend,
    assembled_latencies,
    model_config,
)
from serving.util.nvidia import Gpu, gpu

MODELS = {
    "clip_image",
    "clip_text",
    "clip_text_truncate",
    "clip_zero_shot",
    "image_preprocess",
    "image_preprocess_large",
    "image_tower",
    "text_tokenize",
    "text_tower",
}
UNBATCHED = {"clip_zero_shot", "clip_text", "clip_text_truncate"}
"""The first divides its inputs into batches itself; the others have a cache."""
OPTIONAL = {"prefix_tree"}  # tests/integration/test_prefix_trees.py assembles it


def read(path: Path):
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def bundle_with(tiny_bundle: Bundle, tmp_path: Path, change) -> Bundle:
    """A bundle beside the tiny one with a changed manifest and the same files."""
    path = tmp_path / "bundle"
    path.mkdir()
    for file in tiny_bundle.path.iterdir():
        if file.name != "manifest.json":
            (path / file.name).hardlink_to(file)
    manifest = change(json.loads((tiny_bundle.path / "manifest.json").read_text()))
    (path / "manifest.json").write_text(sealed(unsealed(manifest)))
    return Bundle.open(path)


def failed(manifest: dict) -> dict:
    for artifact in manifest["artifacts"]:
        for verdict in artifact["verdicts"]:
            verdict["passed"] = artifact["graph"] != "text"
            verdict["min_cosine"] = 0.5
    return manifest


def test_every_committed_configuration_is_complete():
    found = {path.parent.name for path in SOURCE.glob("*/config.pbtxt")}
    assert found == MODELS | OPTIONAL
    for name in found:
        config = read(SOURCE / name / "config.pbtxt")
        assert config.name == name
        assert (config.max_batch_size > 0) == (name not in UNBATCHED)
        assert config.backend or config.platform
        assert config.input[0].dims
        assert config.output[0].dims


def test_configurations_have_the_facts_of_the_bundle(tiny_bundle, tmp_path):
    target = assemble(
        tiny_bundle, tmp_path / "repository", runner="onnxruntime:fp32", max_batch_size=16
    )
    configs = {path.parent.name: read(path) for path in target.glob("*/config.pbtxt")}
    assert configs.keys() == MODELS
    zero_shot = configs["clip_zero_shot"]
    assert zero_shot.max_batch_size == 0
    assert zero_shot.parameters["chunk"].string_value == "16"
    assert int(zero_shot.parameters["cache_bytes"].string_value) == 64 << 20
    assert {c.max_batch_size for name, c in configs.items() if name not in UNBATCHED} == {16}
    assert {configs[name].max_batch_size for name in UNBATCHED} == {0}
    assert list(configs["image_preprocess"].output[0].dims) == [3, 32, 32]
    assert list(configs["image_tower"].input[0].dims) == [3, 32, 32]
    assert list(configs["clip_image"].output[0].dims) == [32]
    assert list(configs["clip_text"].input[0].dims) == [-1, 1]
    assert list(configs["clip_text_truncate"].output[0].dims) == [-1, 32]
    assert list(configs["text_tower"].input[0].dims) == [-1]
    assert configs["clip_text"].response_cache.enable
    assert configs["image_tower"].parameters["runner"].string_value == "onnxruntime:fp32"
    parameters = configs["clip_image"].parameters
    assert float(parameters["logit_scale"].string_value) == pytest.approx(
        tiny_bundle.manifest.logit_scale
    )
    assert json.loads(parameters["templates"].string_value) == list(tiny_bundle.manifest.templates)
    assert parameters["weights_sha256"].string_value == (
        tiny_bundle.manifest.provenance.weights_sha256
    )
    assert parameters["embed_dim"].string_value == "32"
    # A tower contains only its graph, and the tokenizer only its file.
    names = {p.name for p in (target / "text_tower" / "1" / "bundle").iterdir()}
    assert names == {"manifest.json", "text.fp32.onnx"}
    for name in ("text_tokenize", "clip_zero_shot"):
        names = {p.name for p in (target / name / "1" / "bundle").iterdir()}
        assert names == {"manifest.json", "tokenizer.json"}


@pytest.mark.parametrize("backend", ["python", "onnxruntime", "tensorrt"])
@pytest.mark.parametrize("most", [None, 7])
def test_every_queue_is_bounded(tiny_bundle, backend, most):
    """Our Python models bound their queues. Triton does it only for a model with several
    processes."""
    for name in MODELS:
        options = {} if most is None else {"max_queue": most}
        config = model_config(name, tiny_bundle.manifest, backend, 16, **options)
        bound = config.parameters["max_queue"].string_value
        policy = config.dynamic_batching.default_queue_policy
        if name == "image_preprocess_large":  # image_preprocess bounds what it passes on
            assert (bound, policy.max_queue_size) == ("", 0)
            assert policy.allow_timeout_override
            continue
        assert bound == (str(most or 512) if config.backend == "python" else "")
        if name != "image_preprocess":
            assert not config.dynamic_batching.HasField("default_queue_policy")
            continue
        assert config.instance_group[0].count >= 2
        assert int(config.parameters["max_large"].string_value) >= 1
        assert policy.max_queue_size == (most or 512)
        assert policy.default_timeout_microseconds == 30_000_000
        assert policy.allow_timeout_override
        assert policy.timeout_action == policy.REJECT


def test_native_backend_gets_the_graph_and_a_warm_up(tiny_bundle, tmp_path):
    target = assemble(tiny_bundle, tmp_path / "repository", backend="onnxruntime")
    config = read(target / "text_tower" / "config.pbtxt")
    assert config.backend == "onnxruntime"
    version = target / "text_tower" / "1"
    assert [path.name for path in version.iterdir()] == [config.default_model_filename]
    warm = {(w.batch_size, *w.inputs["input_ids"].dims) for w in config.model_warmup}
    assert warm == {(b, n) for b in (1, 8, 32) for n in (8, 16, 24, 32, 48, 77)}
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]


def test_tensorrt_configuration_has_profiles_and_a_warm_up(tiny_bundle):
    image = model_config("image_tower", tiny_bundle.manifest, "tensorrt", 32)
    text = model_config("text_tower", tiny_bundle.manifest, "tensorrt", 32)
    kind = model_config_pb2.ModelInstanceGroup.KIND_GPU
    for config in (image, text):
        assert config.platform == "tensorrt_plan"
        assert not config.backend
        assert config.instance_group[0].kind == kind
        assert {w.batch_size for w in config.model_warmup} == {1, 8, 32}
    assert list(image.instance_group[0].profile) == ["0"]
    assert list(text.instance_group[0].profile) == ["0", "1"]


def with_plans(bundle: Bundle, path: Path, **changes) -> Bundle:
    """A copy with an engine of each fp16 tower. The facts are invented, and the files are never
    run."""
    copy = bundle_with(bundle, path, lambda manifest: manifest)
    artifacts = list(copy.manifest.artifacts)
    ends_of: dict[Tower, list[tuple[int, ...]]] = {
        "image": [(3, 32, 32)] * 2,
        "text": [(2,), (77,)],
    }
    for tower, ends in ends_of.items():
        graph = copy.artifact(tower, "fp16")
        facts: dict[str, Any] = {
            "library": "tensorrt",
            "version": "10.16.1.11",
            "device": "NVIDIA H200",
            "compute_capability": "9.0",
            "cuda": "13.0",
            "profiles": (
                Profile(minimum=(1, *ends[0]), optimum=(8, *ends[1]), maximum=(32, *ends[1])),
            ),
            "onnx_sha256": graph.files[0].sha256,
            "build_seconds": 1.0,
            "workspace_bytes": 1 << 30,
            "optimization_level": 3,
        }
        plan = copy.path / "engines" / "h200" / f"{tower}.fp16.plan"
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_bytes(b"a plan of " + tower.encode())
        files = (describe_file(plan, copy.path),)
        verdict = replace(graph.verdicts[0], runner="tensorrt:fp16")
        engine = Engine(**(facts | changes))
        artifacts.append(
            replace(graph, kind="engine", files=files, engine=engine, verdicts=(verdict,))
        )
    return Bundle(copy.path, replace(copy.manifest, artifacts=tuple(artifacts)))


@pytest.fixture
def h200(monkeypatch):
    """The facts of a machine that runs none of these tests."""
    device = Gpu(name="NVIDIA H200", compute_capability="9.0", memory_bytes=1 << 37, cuda="13.0")
    monkeypatch.setattr(tensor_rt, "gpu", lambda: device)
    monkeypatch.setattr(tensor_rt, "library_version", lambda _: "10.16.1.11")


def test_engines_are_assembled_for_the_tensorrt_backend(tiny_bundle, tmp_path, h200):
    bundle = with_plans(tiny_bundle, tmp_path)
    target = assemble(
        bundle,
        tmp_path / "repository",
        backend="tensorrt",
        precision="fp16",
        max_batch_size=32,
    )
    for tower in ("image", "text"):
        config = read(target / f"{tower}_tower" / "config.pbtxt")
        assert config.platform == "tensorrt_plan"
        plan = target / f"{tower}_tower" / "1" / config.default_model_filename
        assert plan.read_bytes() == b"a plan of " + tower.encode()
    assert assembled_backend(target) == "tensorrt"
    text = read(target / "text_tower" / "config.pbtxt")
    assert text.optimization.cuda.graphs
    captured = {
        (g.batch_size, *g.input["input_ids"].dim) for g in text.optimization.cuda.graph_spec
    }
    warm = {(w.batch_size, *w.inputs["input_ids"].dims) for w in text.model_warmup}
    assert captured == warm == {(b, n) for b in (1, 8, 32) for n in (8, 16, 24, 32, 48, 77)}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"device": "NVIDIA L4"}, {}, r"device: built on NVIDIA L4 .*this machine has NVIDIA H200"),
        ({"version": "10.13.3"}, {}, r"version: built by tensorrt 10\.13\.3, .* 10\.16\.1\.11"),
        ({"onnx_sha256": "0" * 64}, {}, r"graph: the engine was built .*0000\.\.\., the bundle"),
        ({"weights_stripped": True}, {}, r"without its weights, and Triton cannot refit them"),
        ({}, {"max_batch_size": 64}, r"batches of up to 32, requested are 64; .*-batch-size 64"),
        ({}, {"precision": "int8"}, r"has no int8 image engine of tensorrt"),
    ],
)
def test_engine_that_does_not_fit_is_rejected(
    tiny_bundle, tmp_path, h200, changes, options, message
):
    """The error names the mismatch and the command that builds a fitting engine."""
    bundle = with_plans(tiny_bundle, tmp_path, **changes)
    options = {"precision": "fp16", "max_batch_size": 32} | options
    target = tmp_path / "repository"
    with pytest.raises(ClipDeployError, match=message) as caught:
        assemble(bundle, target, backend="tensorrt", **options)
    command = f"clip-deploy engine {bundle.path} --engine tensorrt --precision "
    assert command + options["precision"] in str(caught.value)
    assert not target.exists()
    said: list[str] = []

    def note(step: str, done: int = 0, total: int = 0) -> None:
        said.append(step)

    assemble(bundle, target, backend="tensorrt", fallback=True, progress=note, **options)
    assert assembled_backend(target) == "onnxruntime"
    assert "falling back from TensorRT to ONNX Runtime" in said[0]


def test_engines_are_rejected_without_a_gpu(tiny_bundle, tmp_path):
    if gpu() is not None:
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(RunnerError, match="this machine has no NVIDIA GPU"):
        assemble(
            with_plans(tiny_bundle, tmp_path),
            tmp_path / "repository",
            backend="tensorrt",
            precision="fp16",
        )


def test_engine_without_a_verdict_is_not_assembled(tiny_bundle, tmp_path, h200):
    bundle = with_plans(tiny_bundle, tmp_path)
    artifacts = tuple(
        replace(a, verdicts=()) if a.kind == "engine" else a for a in bundle.manifest.artifacts
    )
    bundle = Bundle(bundle.path, replace(bundle.manifest, artifacts=artifacts))
    with pytest.raises(
        BundleError, match=r"image tower by tensorrt:fp16 did not pass .*\(no verdict\)"
    ):
        assemble(
            bundle,
            tmp_path / "repository",
            backend="tensorrt",
            precision="fp16",
            max_batch_size=32,
        )


def test_failed_artifact_is_not_assembled(tiny_bundle, tmp_path):
    bundle = bundle_with(tiny_bundle, tmp_path, failed)
    with pytest.raises(
        BundleError, match=r"no runner for the text tower: none passed the parity gate"
    ):
        assemble(bundle, tmp_path / "repository")
    with pytest.raises(BundleError, match=r"text tower by openvino:fp32 .*cosine 0\.5"):
        assemble(bundle, tmp_path / "repository", runner="openvino:fp32")
    assert not (tmp_path / "repository").exists()
    assert assemble(bundle, tmp_path / "repository", allow_failed=True).is_dir()


def test_artifact_without_a_verdict_is_not_assembled(tiny_bundle, tmp_path):
    def unjudged(manifest: dict) -> dict:
        for artifact in manifest["artifacts"]:
            artifact["verdicts"] = []
        return manifest

    bundle = bundle_with(tiny_bundle, tmp_path, unjudged)
    with pytest.raises(
        BundleError, match=r"image tower by openvino:int8 did not pass .*\(no verdict\)"
    ):
        assemble(bundle, tmp_path / "repository", runner="openvino:int8")
    with pytest.raises(
        BundleError, match=r"image tower by onnxruntime:fp16 did not pass .*\(no verdict\)"
    ):
        assemble(bundle, tmp_path / "repository", backend="onnxruntime", precision="fp16")


def test_failed_assembly_keeps_the_old_repository(tiny_bundle, tmp_path):
    target = assemble(tiny_bundle, tmp_path / "repository", max_batch_size=4)
    before = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    bundle = bundle_with(tiny_bundle, tmp_path, lambda manifest: manifest)
    graph = bundle.path / "text.fp32.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.unlink()
    graph.write_bytes(content)
    with pytest.raises(BundleError, match="not the file that was exported"):
        assemble(bundle, target, runner="onnxruntime:fp32")
    after = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert after == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "repository"]


def test_missing_precision_is_rejected(tiny_bundle, tmp_path):
    with pytest.raises(RunnerError, match=r"unknown runner 'onnxruntime:int7'; expected one of"):
        assemble(tiny_bundle, tmp_path / "repository", backend="onnxruntime", precision="int7")
    with pytest.raises(BundleError, match=r"no int8-dynamic image graph, only fp16, fp32, int8"):
        assemble(tiny_bundle, tmp_path / "repository", runner="onnxruntime:int8-dynamic")


def test_auto_selects_the_fastest_passed_runner(tiny_bundle, tmp_path):
    target = assemble(tiny_bundle, tmp_path / "repository")
    latencies = assembled_latencies(target)
    for tower in ("image", "text"):
        timed = [latency for latency in latencies if latency.tower == tower]
        slower = [latency.milliseconds for latency in timed[1:]]
        assert slower == sorted(slower)
        assert {t.runner for t in timed} >= {"onnxruntime:fp32", "openvino:fp32"}
        config = read(target / f"{tower}_tower" / "config.pbtxt")
        assert config.parameters["runner"].string_value == timed[0].runner


def test_auto_does_not_time_failed_runners(tiny_bundle, tmp_path):
    def only_one_passed(manifest: dict) -> dict:
        for artifact in manifest["artifacts"]:
            for verdict in artifact["verdicts"]:
                verdict["passed"] = verdict["runner"] == "onnxruntime:fp16"
        return manifest

    target = assemble(bundle_with(tiny_bundle, tmp_path, only_one_passed), tmp_path / "repository")
    assert {latency.runner for latency in assembled_latencies(target)} == {"onnxruntime:fp16"}


def test_specs_of_the_manifest_are_frozen(tiny_bundle):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_bundle.manifest.image.size = 1
