"""Engines in a bundle: built by command, recorded, replaced, and interrupted by kills."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from export.engines.builder import EngineOptions, profiles_of
from export.engines.bundle_engines import add_engines
from export.gate.parity import Expected
from export.gate.verify import judged
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS, Artifact, Manifest
from serving.errors import BundleError
from serving.runners.registry import missing
from serving.util.nvidia import gpu
from serving.util.progress import silent
from serving.util.typed_json import from_json
from tests.support.engine_bundles import (
    ENGINE,
    RTX,
    RTX_ENGINE,
    copied,
    needs_rtx,
    with_plan,
    without_gpu,
)
from tests.support.paths import CHECKOUT


def plans_of(bundle: Bundle) -> list[Artifact]:
    return [a for a in bundle.manifest.artifacts if a.kind == "engine"]


def files_in(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def planned(tiny_bundle, tmp_path_factory) -> Bundle:
    """The tiny bundle with RTX engines of its fp16 graphs. Do not change it."""
    if RTX is None:
        pytest.skip("no TensorRT-RTX: make setup")
    copy = copied(tiny_bundle, tmp_path_factory.mktemp("planned") / "bundle")
    return add_engines(copy, ["fp16"], EngineOptions(library="tensorrt-rtx"), silent)


@needs_rtx
def test_command_builds_engines(command, tiny_bundle, tmp_path):
    """The command builds fp16 and INT8 engines of both towers and records each with its sidecar."""
    before = copied(tiny_bundle, tmp_path / "bundle")
    options = ("--engine", "tensorrt-rtx", "--max-batch-size", 8)
    code, out, err = command(before.path, *options, "--json")
    assert code == 0, err
    made = Bundle.open(before.path)
    document = json.loads(out)
    assert document["path"] == str(made.path)
    assert from_json(Manifest, document["manifest"]) == made.manifest

    plans = plans_of(made)
    assert [(p.precision, p.tower) for p in plans] == [
        ("fp16", "image"),
        ("int8", "image"),
        ("fp16", "text"),
        ("int8", "text"),
    ]
    graphs = tuple(a for a in made.manifest.artifacts if a.kind == "onnx")
    assert graphs == before.manifest.artifacts
    folder = f"engines/any-tensorrt-rtx-{RTX}"
    for plan in plans:
        name = f"{folder}/{plan.tower}.{plan.precision}.plan"
        assert [file.name for file in plan.files] == [name, f"{name}.json"]
        path = made.verified(plan)
        assert path.stat().st_size == plan.files[0].bytes > 1_000_000
        engine = plan.engine
        assert (engine.library, engine.version, engine.device) == ("tensorrt-rtx", RTX, None)
        assert engine.onnx_sha256 == made.artifact(plan.tower, plan.precision).files[0].sha256
        assert engine.profiles == profiles_of(plan.tower, made.manifest, 8)
        assert 0 < engine.build_seconds < 60
        sidecar = json.loads((made.path / f"{name}.json").read_text())
        assert sidecar == json.loads(
            json.dumps(
                {"tower": plan.tower, "precision": plan.precision, "sha256": plan.files[0].sha256}
                | asdict(engine)
            )
        )
        if reason := missing(f"tensorrt-rtx:{plan.precision}"):
            assert plan.verdicts == ()
            assert f"no verdict on {name}: {reason}" in err
        else:
            assert plan.passed(f"tensorrt-rtx:{plan.precision}")
    assert files_in(made.path) == files_in(tiny_bundle.path) | {
        file.name for plan in plans for file in plan.files
    }
    assert "Traceback" not in err


@needs_rtx
def test_command_prints_a_table_of_engines(command, planned, tmp_path):
    bundle = copied(planned, tmp_path / "bundle")
    code, out, _ = command(bundle.path, "--engine", "tensorrt-rtx", "--precision", "fp16")
    assert code == 0  # engines without a verdict are no failure
    assert out.count("not run here") == (0 if gpu() else 2)
    assert out.count("tensorrt-rtx:fp16") == (2 if gpu() else 0)


@needs_rtx
def test_new_engine_replaces_the_old_one(planned, tmp_path):
    """After each build there is one engine of each tower, and no file that is not in the
    manifest."""
    bundle = copied(planned, tmp_path / "bundle")
    graphs = files_in(planned.path) - {f.name for plan in plans_of(planned) for f in plan.files}
    for max_batch in (2, 4, 6):
        old = plans_of(bundle)
        options = EngineOptions(library="tensorrt-rtx", max_batch=max_batch)
        bundle = add_engines(bundle, ["fp16"], options, silent)
        assert Bundle.open(bundle.path).manifest == bundle.manifest
        plans = plans_of(bundle)
        assert [plan.tower for plan in plans] == list(TOWERS)
        assert not {plan.file for plan in plans} & {plan.file for plan in old}
        for plan in plans:
            assert bundle.verified(plan).is_file()
            assert plan.engine.profiles[0].maximum[0] == max_batch
        assert files_in(bundle.path) == graphs | {f.name for plan in plans for f in plan.files}


@needs_rtx
@pytest.mark.parametrize("number", [0, 1])
def test_verify_detects_a_changed_engine_or_sidecar(planned, tmp_path, number):
    """The check also works on a machine that cannot run the engine."""
    bundle = copied(planned, tmp_path / "bundle")
    plan = plans_of(bundle)[0]
    nothing = Expected(probes=[], labelled=None)
    if missing("tensorrt-rtx:fp16"):
        assert judged(bundle, plan, nothing).verdicts == ()
    path = bundle.path / plan.files[number].name
    content = path.read_bytes()
    path.unlink()  # it may be a hard link to a shared file
    path.write_bytes(content + b" ")
    with pytest.raises(BundleError, match=f"{path.name} is not the file that was exported"):
        judged(bundle, plan, nothing)


@needs_rtx
def test_engines_of_other_machines_and_versions_are_kept(tiny_bundle, tmp_path):
    others = (ENGINE, replace(RTX_ENGINE, version="1.6.0.1"))
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", *others)
    old = plans_of(bundle)
    made = add_engines(bundle, ["fp16"], EngineOptions(library="tensorrt-rtx"), silent)
    assert plans_of(made)[:2] == old
    assert len(plans_of(made)) == 4
    for plan in plans_of(made):
        made.verified(plan)


def test_file_outside_the_bundle_is_not_deleted(planned, tmp_path):
    """An untrusted manifest may name such a file as part of an engine that is replaced."""
    bundle = copied(planned, tmp_path / "bundle")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    first = plans_of(bundle)[0]
    for name in ("../precious", f"{Path(first.file).parent}/../../../precious"):
        files = (replace(first.files[0], name=name),)
        artifacts = tuple(
            replace(a, files=files) if a == first else a for a in bundle.manifest.artifacts
        )
        evil = Bundle(bundle.path, replace(bundle.manifest, artifacts=artifacts))
        add_engines(evil, ["fp16"], EngineOptions(library="tensorrt-rtx"), silent)
        assert precious.read_text() == "mine"


KILLED_AT = """
import os, shutil, signal, sys
from pathlib import Path

from export.engines.bundle_engines import add_engines
from export.engines.builder import EngineOptions
from serving.bundles.bundle import Bundle
from serving.util.progress import silent

source, target, most = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for moment in range(most):  # before that many files were renamed or deleted
    path = target / str(moment)
    shutil.copytree(source, path, copy_function=os.link)
    child = os.fork()
    if child == 0:
        left = moment

        def watch(event, arguments):
            global left
            if event in ("os.rename", "os.remove") and str(path) in str(arguments[0]):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        options = EngineOptions(library="tensorrt-rtx", max_batch=2)
        add_engines(Bundle.open(path), ["fp16"], options, silent)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(planned, tiny_bundle, tmp_path_factory) -> dict[str, list[Bundle]]:
    """Bundles whose build was killed before its first, second, ... file operation."""
    found = {}
    for name, source, most in (("new", tiny_bundle, 4), ("again", planned, 7)):
        target = tmp_path_factory.mktemp(name)
        done = subprocess.run(
            [sys.executable, "-c", KILLED_AT, str(source.path), str(target), str(most)],
            env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(-signal.SIGKILL)] * most
        found[name] = [Bundle.open(target / str(moment)) for moment in range(most)]
    return found


def test_killed_build_leaves_an_intact_bundle(killed, planned):
    """The manifest names the old engines until the new ones are finished, and all its files
    verify."""
    for bundle in (*killed["new"], *killed["again"]):
        for artifact in bundle.manifest.artifacts:
            bundle.verified(artifact)
    # An engine has two files, which are written before the manifest.
    assert [len(plans_of(bundle)) for bundle in killed["new"]] == [0, 0, 0, 1]
    for moment, bundle in enumerate(killed["again"]):
        image, text = sorted(plans_of(bundle), key=lambda plan: plan.tower)
        assert image.engine.profiles[0].maximum[0] == (2 if moment >= 3 else 64)
        assert text in plans_of(planned)


@pytest.mark.parametrize(("kind", "moment"), [("new", 1), ("again", 3), ("again", 6)])
def test_build_succeeds_after_a_kill(killed, planned, tmp_path, kind, moment):
    """The files that the killed build left are removed."""
    bundle = copied(killed[kind][moment], tmp_path / "bundle")
    left_over = files_in(bundle.path) - files_in(planned.path)
    assert left_over
    made = add_engines(bundle, ["fp16"], EngineOptions(library="tensorrt-rtx"), silent)
    plans = plans_of(made)
    assert [plan.tower for plan in plans] == list(TOWERS)
    for plan in plans:
        made.verified(plan)
        assert plan.engine.profiles == profiles_of(plan.tower, made.manifest, 64)
    graphs = files_in(planned.path) - {f.name for plan in plans_of(planned) for f in plan.files}
    assert files_in(made.path) == graphs | {f.name for plan in plans for f in plan.files}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(
            ["--engine", "tensorrt", "--precision", "fp16"],
            ["TensorRT builds an engine on the GPU that will run it", "--engine tensorrt-rtx"],
            marks=without_gpu,
            id="TensorRT without a GPU",
        ),
        pytest.param([], ["TensorRT builds an engine"], marks=without_gpu, id="nothing asked for"),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--version-compatible"],
            ["only with the version of the library", "leave out --version-compatible"],
            id="RTX, version-compatible",
        ),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--hardware-compatible"],
            ["run on every RTX GPU", "out --version-compatible and --hardware-compatible"],
            id="RTX, hardware-compatible",
        ),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--strip-weights"],
            ["only on a machine with an RTX GPU", "leave out --strip-weights"],
            marks=without_gpu,
            id="RTX, stripped",
        ),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--precision", "int8-fp16"],
            ["has no int8-fp16 image graph, only fp16, fp32, int8", "--precision int8-fp16"],
            id="no such graph",
        ),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--precision", "int8-dynamic"],
            ["engines are built from fp32, fp16, int8 and int8-fp16 graphs, not from int8-dynamic"],
            id="a graph that no engine is built from",
        ),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--timing-cache", "/"],
            ["TensorRT-RTX does not time kernels during a build; leave out --timing-cache"],
            id="RTX, timing cache",
        ),
    ],
)
def test_invalid_build_requests_are_rejected(command, tiny_bundle, tmp_path, options, said):
    bundle = copied(tiny_bundle, tmp_path / "bundle")
    code, out, err = command(bundle.path, *options, "--json")
    assert (code, out) == (2, "")
    assert "error:" in err
    assert "Traceback" not in err
    for part in said:
        assert part in err
    assert files_in(bundle.path) == files_in(tiny_bundle.path)
    assert Bundle.open(bundle.path).manifest == tiny_bundle.manifest


@needs_rtx
def test_tampered_graph_is_not_built(tiny_bundle, tmp_path):
    bundle = copied(tiny_bundle, tmp_path / "bundle")
    graph = bundle.path / "text.fp16.onnx"
    content = graph.read_bytes()
    graph.unlink()
    graph.write_bytes(content + b" ")
    with pytest.raises(BundleError, match=r"text\.fp16\.onnx is not the file that was exported"):
        add_engines(bundle, ["fp16"], EngineOptions(library="tensorrt-rtx"), silent)
    # Engines that were finished before the error are kept.
    assert [plan.tower for plan in plans_of(Bundle.open(bundle.path))] == ["image"]
