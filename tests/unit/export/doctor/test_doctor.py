"""`python -m export doctor` compared with other sources about this machine, and in reduced
environments."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import pytest

from export.cli import doctor_table
from export.doctor import installed
from export.doctor import report as doctor
from export.doctor.installed import Software, packages, programs
from export.doctor.report import Machine, memory_limit
from serving.runners.spec import RUNNERS, RunnerSpec
from serving.triton import embedded
from serving.util.nvidia import Gpu
from tests.support.paths import CHECKOUT

EXPORT, CPU, EMBEDDED, GPU, RTX = (
    f"pip install 'clip-deploy[{extra}]'" for extra in ("export", "cpu", "embedded", "gpu", "rtx")
)
NEEDS_GPU = "needs an NVIDIA GPU and its driver"
FLAGS = set(
    re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
)
# Packages that a client's environment lacks, and so does the system's Python.
EXTRA = (
    *("torch", "functorch", "onnx", "openvino", "tensorrt", "cuda", "safetensors", "nvidia"),
    *("huggingface_hub", "pytriton", "transformers", "clip", "__editable__"),
)


def run_doctor(*options: str, python: str = sys.executable, path: tuple[Path, ...] = ()) -> str:
    """Return the output of the command, run in its own process with `path` first on the module
    path."""
    done = subprocess.run(
        [python, "-m", "export", "doctor", *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, CHECKOUT)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def report() -> dict:
    """The report on this machine and this environment."""
    return json.loads(run_doctor("--json"))


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    """A virtual environment with the dependencies of a client and no extra."""
    home = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(EXTRA):
            (site / entry.name).symlink_to(entry)
    return str(home / "bin" / "python")


@pytest.fixture(scope="module")
def bare(bare_python) -> dict:
    return json.loads(run_doctor("--json", python=bare_python))


def test_machine_facts_equal_those_of_the_system(report):
    machine = report["machine"]
    assert machine["bf16"] == bool(FLAGS & {"avx512_bf16", "amx_bf16"})
    vnni = "VNNI" if FLAGS & {"avx512_vnni", "avx_vnni"} else "none"
    assert machine["int8"] == ("AMX" if "amx_int8" in FLAGS else vnni)
    assert f"model name\t: {machine['cpu']}\n" in Path("/proc/cpuinfo").read_text()
    assert 1 <= machine["cpus"] <= int(subprocess.check_output(["nproc"]))
    total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]
    assert 0 < machine["memory_bytes"] <= int(total) * 1024
    assert machine["python"] == sys.version.split()[0]


def test_versions_are_those_of_the_distributions(report):
    names = set()
    for one in report["software"]:
        try:
            version = importlib.metadata.version(one["name"])
        except importlib.metadata.PackageNotFoundError:
            continue
        names.add(one["name"])
        assert one["version"] == version
    assert {"torch", "onnx", "onnxscript", "onnxruntime"} <= names


def test_package_facts_equal_those_of_the_packages(report):
    import onnxruntime
    import torch

    software = by_name(report["software"])
    facts = software["torch"]["facts"]
    assert (facts["cuda"], facts["gpu"]) == (torch.version.cuda, torch.cuda.is_available())
    providers = software["onnxruntime"]["facts"]["providers"]
    assert providers == onnxruntime.get_available_providers()
    if software["openvino"]["state"] == "works":
        assert ("BF16" in software["openvino"]["facts"]["cpu"]) == report["machine"]["bf16"]
    if software["nvidia-pytriton"]["state"] == "works":
        folder = Path(software["nvidia-pytriton"]["facts"]["libpython"])
        assert list(folder.glob("libpython*"))


def test_export_is_possible_where_the_tests_run(report):
    abilities = by_name(report["abilities"])
    for name in ("export fp32/fp16 graphs", "make int8 graphs"):
        assert abilities[name] == {"name": name, "possible": True, "why": [], "mend": []}


def test_all_runners_are_reported(report):
    """Runners that other tests use on this machine are reported as possible."""
    runners = by_name(report["runners"])
    assert list(runners) == list(map(str, RUNNERS))
    assert runners["onnxruntime:fp32"]["possible"]
    bf16 = runners["openvino:bf16"]
    assert bf16["possible"] == (runners["openvino:fp32"]["possible"] and report["machine"]["bf16"])


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")
def test_missing_gpu_is_reported(report):
    assert report["machine"]["gpu"] is None
    abilities, runners = by_name(report["abilities"]), by_name(report["runners"])
    for name in ("TensorRT engines (build)", "TensorRT engines (run)"):
        assert NEEDS_GPU in abilities[name]["mend"]
    assert NEEDS_GPU not in abilities["TensorRT-RTX engines (build)"]["mend"]
    for name, runner in runners.items():
        on_cpu = name.startswith(("onnxruntime:", "openvino:"))
        assert (NEEDS_GPU in runner["mend"]) == (not on_cpu), name
        assert on_cpu or not runner["possible"]


@pytest.mark.gpu
@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no nvidia-smi")
def test_gpu_is_reported(report):
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    name, driver, capability = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    machine = report["machine"]
    assert (machine["gpu"]["name"], machine["gpu"]["compute_capability"]) == (name, capability)
    assert machine["nvidia_driver"] in (driver, None)  # some sandboxes hide the driver version
    assert not any(NEEDS_GPU in row["mend"] for row in (*report["abilities"], *report["runners"]))


def test_missing_extras_are_reported_with_install_commands(bare):
    software, abilities = by_name(bare["software"]), by_name(bare["abilities"])
    for name, mend in (
        *((name, EXPORT) for name in ("torch", "onnx", "onnxscript", "safetensors")),
        *((name, CPU) for name in ("onnxruntime", "openvino")),
        ("nvidia-pytriton", EMBEDDED),
        ("tensorrt", GPU),
        ("tensorrt-rtx", RTX),
    ):
        found = software[name]
        assert (found["state"], found["version"], found["mend"]) == ("missing", None, mend)
    for name, mend in (
        ("export fp32/fp16 graphs", EXPORT),
        ("make int8 graphs", EXPORT),
        ("TensorRT-RTX engines (build)", RTX),
        ("serve embedded", EMBEDDED),
    ):
        assert abilities[name]["possible"] is False
        assert abilities[name]["mend"] == [mend]
    (why,) = abilities["export fp32/fp16 graphs"]["why"]
    assert why.startswith("not installed: torch, onnx, ")
    assert "neither onnxruntime nor openvino works" in abilities["serve embedded"]["why"]
    for runner in bare["runners"]:
        assert not runner["possible"]
        if runner["name"].startswith(("onnxruntime:", "openvino:")):
            assert runner["mend"] == [CPU]


def test_tables_fit_a_file_and_show_brackets(bare_python):
    """Tables have the width of a report in a file, and brackets are not interpreted as markup."""
    started = time.monotonic()
    printed = run_doctor(python=bare_python)
    assert time.monotonic() - started < 10
    assert max(map(len, printed.splitlines())) <= 120
    for title in ("This machine", "Tasks on this machine", "Runners on this machine"):
        assert title in printed
    for words in (EXPORT, EMBEDDED, GPU, RTX, "not installed: torch, onnx", "memory", "bfloat16"):
        assert words in printed
    for runtime in {spec.runtime for spec in RUNNERS}:
        assert len(re.findall(rf"^│ {runtime}: ", printed, re.MULTILINE)) == 1


def test_library_that_aborts_the_interpreter_is_reported(tmp_path, report):
    (tmp_path / "tensorrt").mkdir()
    fake = "import os\nprint('hello', flush=True)\nos.write(1, b'{')\nos.abort()"
    (tmp_path / "tensorrt" / "__init__.py").write_text(fake)
    document = json.loads(run_doctor("--json", path=(tmp_path,)))
    software, before = by_name(document["software"]), by_name(report["software"])
    broken = software.pop("tensorrt")
    assert broken["state"] == "broken"
    assert "importing it ended Python (signal 6, Aborted)" in broken["error"]
    before.pop("tensorrt")
    assert software == before
    abilities, runners = by_name(document["abilities"]), by_name(document["runners"])
    why = "installed but broken: tensorrt"
    for row in (abilities["TensorRT engines (build)"], runners["tensorrt:fp16"]):
        assert not row["possible"]
        assert why in row["why"]
        assert any(GPU in mend for mend in row["mend"])
    assert not any(why in row["why"] for row in runners.values() if "tensorrt:" not in row["name"])


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended Python (signal 11, Segmentation fault)"),
        ("import os; os._exit(0)", "ended Python (exit code 0)"),
        ("import os, sys; sys.stderr.write('no way\\n'); os._exit(3)", "(exit code 3): no way"),
        ("import time; time.sleep(60)", "ended Python (no answer within 2 s)"),
        ("raise OSError('libnvinfer.so.10: not\\nfound')", "OSError: libnvinfer.so.10: not found"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
    ],
)
def test_failed_import_is_reported(tmp_path, monkeypatch, source, error):
    """The package after the broken one is still reported as working."""
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    few = {name: installed._PACKAGES[name] for name in ("onnx", "tensorrt")}
    monkeypatch.setattr(installed, "_PACKAGES", few)
    monkeypatch.setattr(installed, "IMPORTS_TIMEOUT_S", 2)
    onnx, tensorrt = packages()
    assert onnx.state == "works"
    assert tensorrt.state == "broken"
    assert error in tensorrt.error


def distribution(folder: Path, name: str, version: str) -> None:
    """Write the metadata that pip leaves for a package, without the package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_distribution_without_its_module_is_broken(tmp_path, monkeypatch):
    distribution(tmp_path, "tensorrt", "10.99")
    monkeypatch.syspath_prepend(tmp_path)
    found = installed._package("tensorrt", {"error": ""})
    assert (found.state, found.version) == ("broken", "10.99")
    assert found.error == "the distribution is installed, but not its module tensorrt"
    assert found.mend == f"pip uninstall --yes tensorrt; {GPU}"


def test_both_distributions_of_onnxruntime_are_reported(tmp_path, monkeypatch):
    """pip does not detect that both install the same files."""
    distribution(tmp_path, "onnxruntime-gpu", "1.99")
    monkeypatch.syspath_prepend(tmp_path)
    found = installed._package("onnxruntime", {"version": "1.99", "facts": {}})
    assert found.facts["distributions"] == ["onnxruntime", "onnxruntime-gpu"]
    assert "overwrite each other" in doctor_table._state(found)


def test_embedded_triton_requires_libpython(monkeypatch):
    pytest.importorskip("pytriton")
    monkeypatch.setattr(embedded, "libpython_directories", list)
    found = installed.embedded()
    assert found.state == "broken"
    assert "libpython3" in found.error
    assert "apt-get install libpython3" in found.mend


@pytest.mark.parametrize(
    ("script", "state", "version", "error"),
    [
        ("echo 28.2.2", "works", "28.2.2", None),
        ("echo fine", "works", None, None),
        (
            "echo Client; echo 'Cannot connect' >&2; exit 1",
            "broken",
            None,
            "docker version: exit code 1: Cannot connect",
        ),
        ("exec sleep 60", "broken", None, "docker version: no answer within 1 s"),
    ],
)
def test_program_versions_and_errors_are_reported(
    tmp_path, monkeypatch, script, state, version, error
):
    (tmp_path / "docker").write_text(f"#!/bin/bash\nexport PATH=/usr/bin:/bin\n{script}\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installed, "PROGRAM_TIMEOUT_S", 1)
    found = {one.name: one for one in programs()}
    docker = found.pop("docker")
    assert (docker.state, docker.version, docker.error) == (state, version, error)
    assert docker.facts == {"path": str(tmp_path / "docker")}
    assert (docker.mend is None) == (state == "works")
    assert {one.state for one in found.values()} == {"missing"}
    lacking = doctor._lacking_all(found | {"docker": docker}, ["docker", "podman"])
    assert bool(lacking) == (state == "broken")


def test_program_for_another_architecture_is_broken(tmp_path, monkeypatch):
    (tmp_path / "trtexec").write_bytes(b"\x7fELF nothing that runs")
    (tmp_path / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    trtexec = next(one for one in programs() if one.name == "trtexec")
    assert trtexec.state == "broken"
    assert "Exec format error" in trtexec.error


@pytest.mark.parametrize(
    ("files", "own", "limit"),
    [
        ({"memory.max": "1000000\n"}, "0::/\n", 1000000),
        ({"memory.max": "max\n"}, "0::/\n", None),
        ({"a/memory.max": "2000000", "a/b/memory.max": "max"}, "0::/a/b\n", 2000000),
        ({"a/memory.max": "2000000"}, "0::/b\n", None),
        ({"memory/memory.limit_in_bytes": "3000000"}, "4:memory:/of/the/host\n0::/\n", 3000000),
        ({"memory/a/memory.limit_in_bytes": "9"}, "5:cpu,cpuacct:/a\n4:hugetlb,memory:/a\n", 9),
        ({"memory/memory.limit_in_bytes": str(2**63 - 4096)}, "4:memory:/\n", None),
        ({}, "", None),
        ({}, None, None),
    ],
    ids=str,
)
def test_memory_limit_is_read_from_cgroups(tmp_path, files, own, limit):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    if own is not None:
        (tmp_path / "own").write_text(own)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_limit(tmp_path, tmp_path / "own") == (limit or total)


H200 = Gpu(name="NVIDIA H200", compute_capability="9.0", memory_bytes=150_000_000_000, cuda="12.8")
MACHINE = Machine(
    python="3.11.7",
    cpu="a CPU",
    cpus=2,
    int8="none",
    bf16=False,
    memory_bytes=1 << 30,
    gpu=None,
    nvidia_driver=None,
)


@pytest.mark.parametrize(
    ("machine", "why", "mend"),
    [
        (MACHINE, "no NVIDIA GPU", NEEDS_GPU),
        (replace(MACHINE, nvidia_driver="580.65"), "driver 580.65 shows", "CUDA_VISIBLE_DEVICES"),
        (replace(MACHINE, gpu=H200), "CUDA 13, but the driver supports 12.8", "newer NVIDIA"),
        (replace(MACHINE, gpu=replace(H200, cuda="13.0")), None, None),
    ],
    ids=["nothing", "a driver", "an old driver", "a GPU"],
)
def test_obstacles_to_gpu_use_are_named(machine, why, mend):
    facts = {"distributions": ["tensorrt-rtx-cu13-bindings"]}
    rtx = Software(name="tensorrt-rtx", purpose="", state="works", facts=facts)
    obstacles = list(doctor._no_gpu(machine, rtx).items())
    if why is None:
        assert obstacles == []
    else:
        assert why in obstacles[0][0]
        assert mend in obstacles[0][1]


def test_cpu_without_bfloat16_cannot_run_bf16():
    cpu = Software(name="openvino", purpose="", state="works", facts={"cpu": ["FP32", "INT8"]})
    bf16, int8 = (
        doctor._obstacles_of(RunnerSpec("openvino", precision), MACHINE, {"openvino": cpu})
        for precision in ("bf16", "int8")
    )
    assert "this CPU has no bfloat16 instructions (avx512_bf16, amx_bf16)" in bf16
    assert "bfloat16" not in str(int8)
