"""Plans in a bundle: recorded, replaced, refused where they do not fit or were tampered with."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from export.__main__ import app
from export.engines.builder import EngineOptions, profiles_of
from export.engines.bundle_engines import add_engines, buildable
from export.gate.parity import Expected
from export.gate.verify import judged
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.engine_facts import Engine, Profile, mismatches
from serving.bundles.manifest import TOWERS, Artifact
from serving.cli.console import run
from serving.errors import BundleError, RunnerError
from serving.runners.registry import missing, open_runner
from serving.runners.tensor_rt import (
    TensorRtRunner,
    fitting_plan,
    library_version,
    load_library,
)
from serving.util.nvidia import Gpu, gpu
from serving.util.progress import silent
from tests.support.paths import CHECKOUT

RTX = library_version("tensorrt-rtx")
needs_rtx = pytest.mark.skipif(RTX is None, reason="no TensorRT-RTX: make setup")
without_gpu = pytest.mark.skipif(gpu() is not None, reason="is about a machine without a GPU")
without_tensorrt = pytest.mark.skipif(
    library_version("tensorrt") is not None, reason="is about a machine without TensorRT"
)

GRAPH = "a" * 64
H200 = Gpu(name="NVIDIA H200", compute_capability="9.0", memory_bytes=141 << 30, cuda="13.0")
H100 = replace(H200, name="NVIDIA H100 80GB HBM3")
V100 = replace(H200, name="Tesla V100-SXM2-16GB", compute_capability="7.0")
A10 = replace(H200, name="NVIDIA A10", compute_capability="8.6")
B200 = replace(H200, name="NVIDIA B200", compute_capability="10.0")
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
COMPATIBLE = replace(ENGINE, version_compatible=True)
AMPERE = replace(ENGINE, hardware_compatible=True)


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
            "10.9.0.34",  # as text it would be later
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
                "graph: the plan was built from one with sha256 aaaaaaaaaaaaaaaa..., the bundle's "
                "is bbbbbbbbbbbbbbbb..."
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
def test_why_a_plan_does_not_fit(engine, graph, device, version, reasons):
    assert mismatches(engine, graph, device, version) == reasons


def test_every_reason_is_given_at_once():
    reasons = mismatches(ENGINE, "b" * 64, V100, "11.4.0.106")
    assert [reason.partition(":")[0] for reason in reasons] == ["graph", "version", "device"]


@pytest.mark.parametrize(
    ("max_batch", "optimum"), [(64, 16), (16, 16), (8, 8), (1, 1)], ids="batch {}".format
)
def test_image_profile(tiny_bundle, max_batch, optimum):
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
def test_text_profiles(tiny_bundle, context, lengths):
    """Every length belongs to exactly one of them."""
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


def copied(bundle: Bundle, path: Path) -> Bundle:
    """A copy to build into: its files are hard links, which nobody writes to."""
    return Bundle.open(Path(shutil.copytree(bundle.path, path, copy_function=os.link)))


def plans_of(bundle: Bundle) -> list[Artifact]:
    return [a for a in bundle.manifest.artifacts if a.kind == "plan"]


def files_in(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def with_plan(bundle: Bundle, path: Path, *engines: Engine, content=b"no plan at all") -> Bundle:
    """A copy with fp16 plans of the image tower as the manifest would have them; nothing runs."""
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
            Artifact(tower="image", kind="plan", precision="fp16", files=files, engine=engine)
        )
    manifest = replace(copy.manifest, artifacts=tuple(artifacts))
    (copy.path / "manifest.json").unlink()  # and with it the link
    (copy.path / "manifest.json").write_text(manifest.to_json())
    return Bundle(copy.path, manifest)


def test_a_manifest_with_plans_comes_back_equal(tiny_bundle, tmp_path):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", ENGINE, RTX_ENGINE)
    again = Bundle.open(bundle.path)
    assert again.manifest == bundle.manifest
    (plan,) = again.plans("image", "fp16", "tensorrt")
    assert plan.engine == replace(ENGINE, onnx_sha256=plan.engine.onnx_sha256)
    assert plan.engine.profiles == (PROFILE,)  # tuples again, not lists
    assert again.artifact("image", "fp16").kind == "onnx"  # a plan is not taken for a graph
    assert again.verified(plan) == bundle.path / "engines" / "0" / "image.fp16.plan"


@pytest.mark.parametrize(
    ("fact", "value"), [("library", "cudnn"), ("profiles", None), ("version", 10)]
)
def test_a_manifest_with_broken_facts_of_a_plan(tiny_bundle, tmp_path, fact, value):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", ENGINE)
    document = json.loads(bundle.manifest.to_json())
    document["artifacts"][-1]["engine"][fact] = value
    (bundle.path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=fact):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_a_bundle_without_plans_says_what_builds_them(tiny_bundle, library):
    with pytest.raises(BundleError) as refused:
        tiny_bundle.plans("text", "int8", library)
    command = f"python -m export engine {tiny_bundle.path} --engine {library} --precision int8"
    assert str(refused.value) == (
        f"{tiny_bundle.path} has no int8 text plan of {library}; build it where it is to run: "
        + command
    )


def test_plans_of_one_library_are_not_plans_of_another(tiny_bundle, tmp_path):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", ENGINE)
    assert len(bundle.plans("image", "fp16", "tensorrt")) == 1
    for asked in (("image", "fp16", "tensorrt-rtx"), ("text", "fp16", "tensorrt")):
        with pytest.raises(BundleError, match="build it where it is to run"):
            bundle.plans(*asked)


def test_int8_beside_fp16_is_chosen_where_there_is_one(tiny_bundle):
    assert buildable(tiny_bundle) == ["fp16", "int8"]
    manifest = tiny_bundle.manifest
    both = [replace(a, precision="int8-fp16") for a in manifest.artifacts if a.precision == "int8"]
    more = replace(manifest, artifacts=(*manifest.artifacts, *both))
    assert buildable(Bundle(tiny_bundle.path, more)) == ["fp16", "int8-fp16"]
    only = replace(
        manifest, artifacts=tuple(a for a in manifest.artifacts if a.precision == "fp32")
    )
    assert buildable(Bundle(tiny_bundle.path, only)) == ["fp32"]


# What is asked for here and cannot be had.


@without_gpu
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["tf32", "fp16", "int8", "int8-fp16"])
def test_no_runner_without_a_gpu(tiny_bundle, tower, precision):
    if RTX is not None:
        reason = f"tensorrt-rtx:{precision}: this machine has no NVIDIA GPU, or no driver for it"
        with pytest.raises(RunnerError, match=reason):
            open_runner(tiny_bundle, tower, f"tensorrt-rtx:{precision}")
    with pytest.raises(RunnerError, match=f"tensorrt:{precision}: "):
        open_runner(tiny_bundle, tower, f"tensorrt:{precision}")


@without_tensorrt
def test_no_runner_without_the_library(tiny_bundle):
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
        "pip install 'clip-deploy[gpu]', or look at `clip-deploy doctor`"
    )


@needs_rtx
def test_no_plan_fits(tiny_bundle, tmp_path):
    """Every plan is named with what is wrong with it, then the command that builds a right one."""
    old = replace(RTX_ENGINE, version="1.6.0.1")
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", old, replace(old, version="2.0.0.1"))
    with pytest.raises(RunnerError) as refused:
        TensorRtRunner(bundle, "image", "tensorrt-rtx", "fp16").__enter__()
    lines = str(refused.value).splitlines()
    no_gpu = "" if gpu() else "; this machine has no NVIDIA GPU"
    assert lines == [
        f"no fp16 image plan of {bundle.path} fits this machine.",
        "engines/0/image.fp16.plan: version: built by tensorrt-rtx 1.6.0.1, this machine has "
        + f"{RTX}{no_gpu}",
        "engines/1/image.fp16.plan: version: built by tensorrt-rtx 2.0.0.1, this machine has "
        + f"{RTX}{no_gpu}",
        f"Build it here: python -m export engine {bundle.path} --engine tensorrt-rtx "
        "--precision fp16",
    ]


@pytest.fixture
def h200(monkeypatch):
    """What the preflight sees; the driver and the libraries see what there is."""
    monkeypatch.setattr("serving.runners.tensor_rt.gpu", lambda: H200)


@needs_rtx
def test_the_fitting_one_of_several(tiny_bundle, tmp_path, h200):
    here = replace(RTX_ENGINE, version=RTX)
    others = [replace(here, version="1.6.0.1"), here, replace(here, version="2.0.0.1")]
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", *others)
    assert fitting_plan(bundle, "image", "fp16", "tensorrt-rtx").file == "engines/1/image.fp16.plan"


@needs_rtx
def test_a_graph_that_was_exported_again(tiny_bundle, tmp_path, h200):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", replace(RTX_ENGINE, version=RTX))
    artifacts = tuple(
        replace(a, files=(replace(a.files[0], sha256="f" * 64),)) if a.kind == "onnx" else a
        for a in bundle.manifest.artifacts
    )
    changed = Bundle(bundle.path, replace(bundle.manifest, artifacts=artifacts))
    with pytest.raises(RunnerError, match=r"graph: the plan was built from .* the bundle's is fff"):
        fitting_plan(changed, "image", "fp16", "tensorrt-rtx")


@needs_rtx
@pytest.mark.parametrize("damage", ["plan", "sidecar", "no plan", "no sidecar"])
def test_what_was_tampered_with_is_never_deserialised(
    tiny_bundle, tmp_path, h200, monkeypatch, damage
):
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", replace(RTX_ENGINE, version=RTX))
    file = bundle.path / "engines" / "0" / f"image.fp16.plan{'.json' * ('sidecar' in damage)}"
    if damage.startswith("no "):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b" ")
    monkeypatch.setattr("serving.runners.tensor_rt.deserialize", lambda *_: pytest.fail("loaded"))
    said = "is missing" if damage.startswith("no ") else "is not the file that was exported"
    with pytest.raises(BundleError, match=f"{file.name} {said}"):
        TensorRtRunner(bundle, "image", "tensorrt-rtx", "fp16").__enter__()


@needs_rtx
def test_a_plan_that_the_library_refuses(tiny_bundle, tmp_path, h200):
    """With its reason: on a machine without a GPU that one, else that this is no plan."""
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", replace(RTX_ENGINE, version=RTX))
    with pytest.raises(RunnerError) as refused:
        TensorRtRunner(bundle, "image", "tensorrt-rtx", "fp16").__enter__()
    start, _, reason = str(refused.value).partition("image.fp16.plan: ")
    assert start == f"tensorrt-rtx {RTX} cannot load {bundle.path}/engines/0/"
    assert len(reason) > 20
    assert reason != "it gives no reason"


# Building into a bundle.


@pytest.fixture
def command(monkeypatch, capfd):
    """Run `python -m export engine` in this process; returns exit code, output and error."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export", "engine", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(app)
        captured = capfd.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def planned(tiny_bundle, tmp_path_factory) -> Bundle:
    """The tiny bundle with RTX plans of its fp16 graphs; do not change it."""
    if RTX is None:
        pytest.skip("no TensorRT-RTX: make setup")
    copy = copied(tiny_bundle, tmp_path_factory.mktemp("planned") / "bundle")
    return add_engines(copy, ["fp16"], EngineOptions(library="tensorrt-rtx"), silent)


@needs_rtx
def test_plans_by_command(command, tiny_bundle, tmp_path):
    """As a user does it: fp16 and INT8 of both towers, in the manifest, each with its sidecar."""
    before = copied(tiny_bundle, tmp_path / "bundle")
    code, out, err = command(before.path, "--engine", "tensorrt-rtx", "--max-batch", 8, "--json")
    assert code == 0, err
    made = Bundle.open(before.path)
    document = json.loads(out)
    assert document.pop("path") == str(made.path)
    assert document == json.loads(made.manifest.to_json())

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
def test_a_table_of_plans(command, planned, tmp_path):
    bundle = copied(planned, tmp_path / "bundle")
    code, out, _ = command(bundle.path, "--engine", "tensorrt-rtx", "--precision", "fp16")
    assert code == 0  # plans without a verdict are no failure
    assert out.count("not run here") == (0 if gpu() else 2)
    assert out.count("tensorrt-rtx:fp16") == (2 if gpu() else 0)


@needs_rtx
def test_a_plan_gives_way_to_a_new_one(planned, tmp_path):
    """Again and again: there is one of each at any time, and no file that is not vouched for."""
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
def test_verifying_notices_a_changed_plan_or_sidecar(planned, tmp_path, number):
    """Also on a machine that cannot run it."""
    bundle = copied(planned, tmp_path / "bundle")
    plan = plans_of(bundle)[0]
    nothing = Expected(probes=[], labelled=None)
    if missing("tensorrt-rtx:fp16"):
        assert judged(bundle, plan, nothing).verdicts == ()
    path = bundle.path / plan.files[number].name
    content = path.read_bytes()
    path.unlink()  # it may be a link to what others use
    path.write_bytes(content + b" ")
    with pytest.raises(BundleError, match=f"{path.name} is not the file that was exported"):
        judged(bundle, plan, nothing)


@needs_rtx
def test_plans_of_other_machines_and_versions_stay(tiny_bundle, tmp_path):
    others = (ENGINE, replace(RTX_ENGINE, version="1.6.0.1"))
    bundle = with_plan(tiny_bundle, tmp_path / "bundle", *others)
    old = plans_of(bundle)
    made = add_engines(bundle, ["fp16"], EngineOptions(library="tensorrt-rtx"), silent)
    assert plans_of(made)[:2] == old
    assert len(plans_of(made)) == 4
    for plan in plans_of(made):
        made.verified(plan)


def test_a_file_elsewhere_is_not_deleted(planned, tmp_path):
    """A manifest that says so of a plan that gives way can be anybody's."""
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
    """Bundles whose build was killed before its first, second, ... change of a file."""
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


def test_a_kill_leaves_a_whole_bundle(killed, planned):
    """The manifest vouches for all that it names: the old plans until the new ones are finished."""
    for bundle in (*killed["new"], *killed["again"]):
        for artifact in bundle.manifest.artifacts:
            bundle.verified(artifact)
    # Files of a plan are two, and after them comes the manifest.
    assert [len(plans_of(bundle)) for bundle in killed["new"]] == [0, 0, 0, 1]
    for moment, bundle in enumerate(killed["again"]):
        image, text = sorted(plans_of(bundle), key=lambda plan: plan.tower)
        assert image.engine.profiles[0].maximum[0] == (2 if moment >= 3 else 64)
        assert text in plans_of(planned)


@pytest.mark.parametrize(("kind", "moment"), [("new", 1), ("again", 3), ("again", 6)])
def test_after_a_kill_it_is_built_again(killed, planned, tmp_path, kind, moment):
    """And what the kill left lying there goes."""
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


# Refusals of the command: one message, exit code 2, and nothing changed.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(
            ["--engine", "tensorrt", "--precision", "fp16"],
            ["TensorRT tunes a plan on the GPU it is for", "--engine tensorrt-rtx"],
            marks=without_gpu,
            id="TensorRT without a GPU",
        ),
        pytest.param([], ["TensorRT tunes a plan"], marks=without_gpu, id="nothing asked for"),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--version-compatible"],
            ["belong to one version of the library", "leave --version-compatible"],
            id="RTX, version-compatible",
        ),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--hardware-compatible"],
            ["run on every RTX GPU", "leave --version-compatible and --hardware-compatible out"],
            id="RTX, hardware-compatible",
        ),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--strip-weights"],
            ["only where there is an RTX GPU", "leave --strip-weights out"],
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
            ["plans are built of fp32, fp16, int8 and int8-fp16 graphs, not of int8-dynamic"],
            id="a graph that no plan is built of",
        ),
        pytest.param(
            ["--engine", "tensorrt-rtx", "--timing-cache", "/"],
            ["TensorRT-RTX measures no kernels when it builds; leave --timing-cache out"],
            id="RTX, timing cache",
        ),
    ],
)
def test_what_cannot_be_built(command, tiny_bundle, tmp_path, options, said):
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
def test_a_graph_that_was_tampered_with_is_not_built(tiny_bundle, tmp_path):
    bundle = copied(tiny_bundle, tmp_path / "bundle")
    graph = bundle.path / "text.fp16.onnx"
    content = graph.read_bytes()
    graph.unlink()
    graph.write_bytes(content + b" ")
    with pytest.raises(BundleError, match=r"text\.fp16\.onnx is not the file that was exported"):
        add_engines(bundle, ["fp16"], EngineOptions(library="tensorrt-rtx"), silent)
    # What was finished before is kept.
    assert [plan.tower for plan in plans_of(Bundle.open(bundle.path))] == ["image"]
