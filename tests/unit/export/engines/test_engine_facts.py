"""Engines that fit a machine, and the reasons why others do not fit."""

import json
from dataclasses import replace

import pytest

from export.engines.builder import profiles_of
from export.engines.bundle_engines import buildable
from serving.bundles.bundle import Bundle
from serving.bundles.engine_facts import mismatches
from serving.bundles.manifest import TOWERS
from serving.errors import BundleError, RunnerError
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec
from serving.runners.tensor_rt import (
    TensorRtRunner,
    fitting_plan,
    library_version,
    load_library,
)
from serving.util.nvidia import gpu
from tests.support.engine_bundles import (
    ENGINE,
    GRAPH,
    H200,
    PROFILE,
    RTX,
    RTX_ENGINE,
    needs_rtx,
    with_plan,
    without_gpu,
)

without_tensorrt = pytest.mark.skipif(
    library_version("tensorrt") is not None, reason="is about a machine without TensorRT"
)


H100 = replace(H200, name="NVIDIA H100 80GB HBM3")


V100 = replace(H200, name="Tesla V100-SXM2-16GB", compute_capability="7.0")


A10 = replace(H200, name="NVIDIA A10", compute_capability="8.6")


B200 = replace(H200, name="NVIDIA B200", compute_capability="10.0")


COMPATIBLE = replace(ENGINE, version_compatible=True)


AMPERE = replace(ENGINE, hardware_compatible=True)


RTX_FP16 = RunnerSpec("tensorrt-rtx", "fp16")


@pytest.mark.parametrize(
    ("engine", "graph", "device", "version", "reasons"),
    [
        pytest.param(ENGINE, GRAPH, H200, "10.13.3.9", [], id="the same in everything"),
        pytest.param(
            ENGINE,
            GRAPH,
            H100,
            "10.13.3.9",
            [
                "device: built on NVIDIA H200 (compute capability 9.0), this machine has NVIDIA "
                "H100 80GB HBM3 (compute capability 9.0)"
            ],
            id="another GPU of the same generation",
        ),
        pytest.param(
            ENGINE,
            GRAPH,
            replace(H200, compute_capability="9.1"),
            "10.13.3.9",
            [
                "device: built on NVIDIA H200 (compute capability 9.0), this machine has NVIDIA "
                "H200 (compute capability 9.1)"
            ],
            id="the same name with another compute capability",
        ),
        pytest.param(
            ENGINE,
            GRAPH,
            H200,
            "10.13.3.10",
            ["version: built by tensorrt 10.13.3.9, this machine has 10.13.3.10"],
            id="a later build",
        ),
        pytest.param(COMPATIBLE, GRAPH, H200, "10.16.1.11", [], id="compatible, later minor"),
        pytest.param(COMPATIBLE, GRAPH, H200, "10.13.3.9", [], id="compatible, same"),
        pytest.param(
            COMPATIBLE,
            GRAPH,
            H200,
            "10.9.0.34",  # a later version when compared as text
            ["version: built by tensorrt 10.13.3.9, this machine has 10.9.0.34"],
            id="compatible, earlier minor",
        ),
        pytest.param(
            COMPATIBLE,
            GRAPH,
            H200,
            "11.4.0.106",
            ["version: built by tensorrt 10.13.3.9, this machine has 11.4.0.106"],
            id="compatible, next major",
        ),
        pytest.param(AMPERE, GRAPH, A10, "10.13.3.9", [], id="hardware-compatible, Ampere"),
        pytest.param(AMPERE, GRAPH, B200, "10.13.3.9", [], id="hardware-compatible, Blackwell"),
        pytest.param(
            AMPERE,
            GRAPH,
            V100,
            "10.13.3.9",
            [
                "device: built for Ampere and later, this machine has Tesla V100-SXM2-16GB "
                "(compute capability 7.0)"
            ],
            id="hardware-compatible, Volta",
        ),
        pytest.param(
            ENGINE,
            "b" * 64,
            H200,
            "10.13.3.9",
            [
                "graph: the engine was built from a graph with sha256 aaaaaaaaaaaaaaaa..., the "
                "bundle's has bbbbbbbbbbbbbbbb..."
            ],
            id="another graph",
        ),
        pytest.param(
            ENGINE, GRAPH, None, "10.13.3.9", ["this machine has no NVIDIA GPU"], id="no GPU"
        ),
        pytest.param(
            ENGINE,
            GRAPH,
            H200,
            None,
            ["library: built by tensorrt 10.13.3.9, which is not installed here"],
            id="no library",
        ),
        pytest.param(RTX_ENGINE, GRAPH, V100, "1.7.1.116", [], id="RTX, whatever GPU"),
        pytest.param(
            RTX_ENGINE,
            GRAPH,
            H200,
            "1.8.0.1",
            ["version: built by tensorrt-rtx 1.7.1.116, this machine has 1.8.0.1"],
            id="RTX, later version",
        ),
        pytest.param(
            RTX_ENGINE, GRAPH, None, "1.7.1.116", ["this machine has no NVIDIA GPU"], id="RTX, none"
        ),
    ],
)
def test_mismatch_of_an_engine_is_explained(engine, graph, device, version, reasons):
    assert mismatches(engine, graph, device, version) == reasons


def test_all_mismatches_are_reported_at_once():
    reasons = mismatches(ENGINE, "b" * 64, V100, "11.4.0.106")
    assert [reason.partition(":")[0] for reason in reasons] == ["graph", "version", "device"]


@pytest.mark.parametrize(
    ("max_batch", "optimum"), [(64, 16), (16, 16), (8, 8), (1, 1)], ids="batch {}".format
)
def test_image_profile_covers_batches_up_to_the_maximum(tiny_bundle, max_batch, optimum):
    (profile,) = profiles_of("image", tiny_bundle.manifest, max_batch)
    assert profile.minimum == (1, 3, 32, 32)
    assert profile.optimum == (optimum, 3, 32, 32)
    assert profile.maximum == (max_batch, 3, 32, 32)


@pytest.mark.parametrize(
    ("context", "lengths"),
    [
        (77, [(2, 16, 32), (33, 77, 77)]),
        (33, [(2, 16, 32), (33, 33, 33)]),
        (32, [(2, 16, 32)]),
        (16, [(2, 16, 16)]),
        (8, [(2, 8, 8)]),
    ],
)
def test_text_profiles_do_not_overlap(tiny_bundle, context, lengths):
    """Every length belongs to exactly one profile."""
    manifest = tiny_bundle.manifest
    manifest = replace(manifest, text=replace(manifest.text, context_length=context))
    profiles = profiles_of("text", manifest, 64)
    found = [(p.minimum[1], p.optimum[1], p.maximum[1]) for p in profiles]
    assert found == lengths
    assert {(p.minimum[0], p.optimum[0], p.maximum[0]) for p in profiles} == {(1, 16, 64)}
    for length in range(2, context + 1):
        assert sum(p.takes((64, length)) for p in profiles) == 1
    for shape in ((1, 1), (1, context + 1), (65, 2), (0, 2)):
        assert not any(p.takes(shape) for p in profiles)


def test_manifest_with_engines_round_trip(tiny_bundle, tmp_path):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", ENGINE, RTX_ENGINE)
    again = Bundle.open(bundle.path)
    assert again.manifest == bundle.manifest
    (plan,) = again.plans("image", "fp16", "tensorrt")
    assert plan.engine == replace(ENGINE, onnx_sha256=plan.engine.onnx_sha256)
    assert plan.engine.profiles == (PROFILE,)  # tuples, not lists
    assert again.artifact("image", "fp16").kind == "onnx"  # an engine is not returned as a graph
    assert again.verified(plan) == bundle.path / "engines" / "0" / "image.fp16.plan"


@pytest.mark.parametrize(
    ("fact", "value"), [("library", "cudnn"), ("profiles", None), ("version", 10)]
)
def test_invalid_engine_facts_in_the_manifest_are_rejected(tiny_bundle, tmp_path, fact, value):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", ENGINE)
    document = json.loads(bundle.manifest.to_json())
    document["artifacts"][-1]["engine"][fact] = value
    (bundle.path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=fact):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_missing_engine_error_names_the_build_command(tiny_bundle, library):
    with pytest.raises(BundleError) as refused:
        tiny_bundle.plans("text", "int8", library)
    command = f"clip-deploy engine {tiny_bundle.path} --engine {library} --precision int8"
    assert str(refused.value) == (
        f"{tiny_bundle.path} has no int8 text engine of {library}; "
        f"build it on the machine that will run it: {command}"
    )


def test_engines_of_another_library_are_not_used(tiny_bundle, tmp_path):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", ENGINE)
    assert len(bundle.plans("image", "fp16", "tensorrt")) == 1
    for asked in (("image", "fp16", "tensorrt-rtx"), ("text", "fp16", "tensorrt")):
        with pytest.raises(BundleError, match="build it on the machine that will run it"):
            bundle.plans(*asked)


def test_int8_fp16_is_built_instead_of_int8_if_available(tiny_bundle):
    assert buildable(tiny_bundle) == ["fp16", "int8"]
    manifest = tiny_bundle.manifest
    both = [replace(a, precision="int8-fp16") for a in manifest.artifacts if a.precision == "int8"]
    more = replace(manifest, artifacts=(*manifest.artifacts, *both))
    assert buildable(Bundle(tiny_bundle.path, more)) == ["fp16", "int8-fp16"]
    only = replace(
        manifest, artifacts=tuple(a for a in manifest.artifacts if a.precision == "fp32")
    )
    assert buildable(Bundle(tiny_bundle.path, only)) == ["fp32"]


@without_gpu
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["tf32", "fp16", "int8", "int8-fp16"])
def test_runner_requires_a_gpu(tiny_bundle, tower, precision):
    if RTX is not None:
        reason = f"tensorrt-rtx:{precision}: this machine has no NVIDIA GPU, or no driver for it"
        with pytest.raises(RunnerError, match=reason):
            open_runner(tiny_bundle, tower, f"tensorrt-rtx:{precision}")
    with pytest.raises(RunnerError, match=f"tensorrt:{precision}: "):
        open_runner(tiny_bundle, tower, f"tensorrt:{precision}")


@without_tensorrt
def test_runner_requires_the_library(tiny_bundle):
    with pytest.raises(RunnerError) as refused:
        open_runner(tiny_bundle, "image", "tensorrt:fp16")
    assert str(refused.value) == (
        "tensorrt:fp16: the package tensorrt is not installed; pip install 'clip-deploy[gpu]'"
    )
    with pytest.raises(RunnerError) as refused:
        load_library("tensorrt")
    assert str(refused.value) == (
        "tensorrt cannot be loaded (import tensorrt: No module named 'tensorrt'; import "
        "tensorrt_bindings: No module named 'tensorrt_bindings'); "
        "pip install 'clip-deploy[gpu]', or run `clip-deploy doctor` for details"
    )


@needs_rtx
def test_error_lists_why_no_engine_fits(tiny_bundle, tmp_path):
    """Every engine is listed with its mismatches, then the command that builds a fitting one."""
    old = replace(RTX_ENGINE, version="1.6.0.1")
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", old, replace(old, version="2.0.0.1"))
    with pytest.raises(RunnerError) as refused:
        TensorRtRunner(bundle, "image", RTX_FP16).__enter__()
    lines = str(refused.value).splitlines()
    no_gpu = "" if gpu() else "; this machine has no NVIDIA GPU"
    assert lines == [
        f"no fp16 image engine of {bundle.path} can run on this machine.",
        "engines/0/image.fp16.plan: version: built by tensorrt-rtx 1.6.0.1, this machine has "
        + f"{RTX}{no_gpu}",
        "engines/1/image.fp16.plan: version: built by tensorrt-rtx 2.0.0.1, this machine has "
        + f"{RTX}{no_gpu}",
        f"Build it here: clip-deploy engine {bundle.path} --engine tensorrt-rtx --precision fp16",
    ]


@pytest.fixture
def h200(monkeypatch):
    """Device as the preflight check sees it. The driver and the libraries still see the real
    machine."""
    monkeypatch.setattr("serving.runners.tensor_rt.gpu", lambda: H200)


@needs_rtx
def test_fitting_engine_is_selected(tiny_bundle, tmp_path, h200):
    here = replace(RTX_ENGINE, version=RTX)
    others = [replace(here, version="1.6.0.1"), here, replace(here, version="2.0.0.1")]
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", *others)
    assert fitting_plan(bundle, "image", "fp16", "tensorrt-rtx").file == "engines/1/image.fp16.plan"


@needs_rtx
def test_engine_of_an_older_graph_does_not_fit(tiny_bundle, tmp_path, h200):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", replace(RTX_ENGINE, version=RTX))
    artifacts = tuple(
        replace(a, files=(replace(a.files[0], sha256="f" * 64),)) if a.kind == "onnx" else a
        for a in bundle.manifest.artifacts
    )
    changed = Bundle(bundle.path, replace(bundle.manifest, artifacts=artifacts))
    with pytest.raises(RunnerError, match=r"graph: the engine was built .* the bundle's has fff"):
        fitting_plan(changed, "image", "fp16", "tensorrt-rtx")


@needs_rtx
@pytest.mark.parametrize("damage", ["plan", "sidecar", "no plan", "no sidecar"])
def test_tampered_engine_is_never_deserialized(tiny_bundle, tmp_path, h200, monkeypatch, damage):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", replace(RTX_ENGINE, version=RTX))
    file = bundle.path / "engines" / "0" / f"image.fp16.plan{'.json' * ('sidecar' in damage)}"
    if damage.startswith("no "):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b" ")
    monkeypatch.setattr("serving.runners.tensor_rt.deserialize", lambda *_: pytest.fail("loaded"))
    said = "is missing" if damage.startswith("no ") else "is not the file that was exported"
    with pytest.raises(BundleError, match=f"{file.name} {said}"):
        TensorRtRunner(bundle, "image", RTX_FP16).__enter__()


@needs_rtx
def test_engine_that_the_library_rejects_is_reported(tiny_bundle, tmp_path, h200):
    """The error has the library's reason: a missing GPU, or that the file is not an engine."""
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", replace(RTX_ENGINE, version=RTX))
    with pytest.raises(RunnerError) as refused:
        TensorRtRunner(bundle, "image", RTX_FP16).__enter__()
    start, _, reason = str(refused.value).partition("image.fp16.plan: ")
    assert start == f"tensorrt-rtx {RTX} cannot load {bundle.path}/engines/0/"
    assert len(reason) > 20
    assert reason != "no reason given"
