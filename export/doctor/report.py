"""Report of this machine's hardware and software, and of the tasks and runners they allow.

`export.doctor.installed` checks the packages; `export.cli.doctor_table` prints the report.
"""

import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from export.doctor.installed import (
    EMBEDDED,
    EXPORT,
    GPU,
    RTX,
    Software,
    embedded,
    packages,
    programs,
)
from serving.runners.registry import missing
from serving.runners.spec import RUNNERS, RunnerSpec, runtime_of
from serving.util.machine import cpu_count, cpu_info
from serving.util.nvidia import Gpu, gpu

_EXPORTING = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "huggingface-hub")

Installed = Mapping[str, Software]
Row = tuple[str, tuple[str, ...], tuple[str, ...]]
"""Name of a task or runner, the reasons why it is not possible, and how to fix them."""

Obstacles = dict[str, str]
"""Reasons why a task or runner is not possible, each with its fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Hardware that determines what runs on this machine, and how fast."""

    python: str
    cpu: str
    cpus: int
    """Number of CPU cores that this process may use."""
    int8: str
    """CPU instructions that make INT8 fast: AMX, VNNI or none."""
    bf16: bool
    """True if the CPU has bfloat16 instructions."""
    memory_bytes: int
    """Memory that this process may use."""
    gpu: Gpu | None
    nvidia_driver: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """Task or runner, and what prevents it on this machine."""

    name: str
    possible: bool
    why: tuple[str, ...]
    """Reasons why it is not possible; empty if it is."""
    mend: tuple[str, ...]
    """Commands or advice that make it possible; all of them are needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """Report printed by `clip-deploy doctor`."""

    machine: Machine
    software: tuple[Software, ...]
    abilities: tuple[Ability, ...]
    runners: tuple[Ability, ...]


def examine() -> DoctorReport:
    """Examine this machine and the installed software."""
    machine = _machine()
    software = (*packages(), embedded(), *programs())
    installed = {item.name: item for item in software}
    return DoctorReport(
        machine=machine,
        software=software,
        abilities=tuple(_ability(n, o) for n, o in _obstacles(machine, installed).items()),
        runners=tuple(
            _ability(str(spec), _obstacles_of(spec, machine, installed)) for spec in RUNNERS
        ),
    )


def memory_limit(root: Path, own: Path) -> int:
    """Return the memory that this process may use, in bytes.

    Args:
        root: mount point of the cgroup file systems, v1 or v2.
        own: file that names the cgroups of this process.
    """
    limits = [psutil.virtual_memory().total]
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        v1 = "memory" in controllers.split(",")
        file = "memory.limit_in_bytes" if v1 else "memory.max"
        group = (root / "memory" if v1 else root) / path.lstrip("/")
        for directory in (group, *group.parents):
            with suppress(OSError, ValueError):  # the file is missing, or its content is `max`
                limits.append(int((directory / file).read_text()))
    return min(limits)


def _machine() -> Machine:
    model, flags = cpu_info()
    fast = {"amx_int8": "AMX", "avx512_vnni": "VNNI", "avx_vnni": "VNNI"}
    driver = None
    with suppress(OSError):
        driver = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
    return Machine(
        python=platform.python_version(),
        cpu=model,
        cpus=cpu_count(),
        int8=next((fast[flag] for flag in fast if flag in flags), "none"),
        bf16=not flags.isdisjoint({"avx512_bf16", "amx_bf16"}),
        memory_bytes=memory_limit(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")),
        gpu=gpu(),
        nvidia_driver=driver[0] if driver else None,
    )


def _ability(name: str, obstacles: Obstacles) -> Ability:
    mend = tuple(dict.fromkeys(filter(None, obstacles.values())))
    return Ability(name=name, possible=not obstacles, why=tuple(obstacles), mend=mend)


def _obstacles(machine: Machine, installed: Installed) -> dict[str, Obstacles]:
    """Return the obstacles of each task."""
    lacks = partial(_lacking, installed)
    trt_gpu, rtx_gpu = (_no_gpu(machine, installed[name]) for name in ("tensorrt", "tensorrt-rtx"))
    return {
        "export fp32/fp16 graphs": lacks(_EXPORTING, EXPORT),
        "make int8 graphs": lacks(_EXPORTING, EXPORT),
        "TensorRT engines (build)": trt_gpu | lacks(["tensorrt"]),
        "TensorRT engines (run)": trt_gpu | lacks(["tensorrt", "cuda-bindings"], GPU),
        "TensorRT-RTX engines (build)": lacks(["tensorrt-rtx"]),  # needs no GPU
        "TensorRT-RTX engines (run)": rtx_gpu | lacks(["tensorrt-rtx", "cuda-bindings"], RTX),
        "serve embedded": lacks(["nvidia-pytriton"])
        | _lacking_all(installed, ["onnxruntime", "openvino"], EMBEDDED),
        "serve in a container": _lacking_all(installed, ["docker", "podman"]),
    }


def _obstacles_of(runner: RunnerSpec, machine: Machine, installed: Installed) -> Obstacles:
    runtime = runtime_of(runner)
    name = runtime.library or runtime.modules[0]
    library, needed = installed[name], [name, *(["cuda-bindings"] if runtime.library else [])]
    obstacles = _no_gpu(machine, library) if runtime.device == "cuda" else {}
    broken = [package for package in needed if installed[package].state == "broken"]
    if broken:  # `missing` does not detect broken packages, or fails on them
        return obstacles | _lacking(installed, broken)
    error = missing(runner)
    # An error without advice is about the GPU, which the obstacles may already name.
    if error is not None and (error.advice or not obstacles):
        obstacles[error.reason] = error.advice
    works = library.state == "works"
    if runner.precision == "bf16" and works and "BF16" not in library.facts["cpu"]:
        reason = "this CPU has no bfloat16 instructions (avx512_bf16, amx_bf16)"
        obstacles[reason] = "use fp32 or int8"
    return obstacles


def _lacking(installed: Installed, names: Iterable[str], install: str | None = None) -> Obstacles:
    """Return the obstacles of a task that needs all of `names`.

    Args:
        installed: all software by name.
        names: the software that the task needs.
        install: command that installs everything missing; by default, one command for each.
    """
    lacking: dict[tuple[str, str], list[str]] = {}
    for item in (installed[name] for name in names):
        if item.state == "missing":
            lacking.setdefault(("not installed", install or item.mend or ""), []).append(item.name)
        elif item.state == "broken":
            lacking.setdefault(("installed but broken", item.mend or ""), []).append(item.name)
    return {f"{state}: {', '.join(names)}": mend for (state, mend), names in lacking.items()}


def _lacking_all(
    installed: Installed, names: Sequence[str], install: str | None = None
) -> Obstacles:
    """Return the obstacles of a task that needs one of `names`, which `install` installs."""
    if any(installed[name].state == "works" for name in names):
        return {}
    mend = install or ", or ".join(dict.fromkeys(installed[name].mend or "" for name in names))
    return {f"neither {' nor '.join(names)} works": mend}


def _no_gpu(machine: Machine, library: Software) -> Obstacles:
    """Return the obstacles of running `library` on this machine's GPU."""
    if machine.gpu is None and machine.nvidia_driver is None:
        return {"no NVIDIA GPU": "needs an NVIDIA GPU and its driver"}
    if machine.gpu is None:
        reason = f"NVIDIA driver {machine.nvidia_driver} shows this process no GPU"
        return {reason: "check CUDA_VISIBLE_DEVICES; start a container with --gpus all"}
    built = re.search(r"-cu(\d+)", " ".join(library.facts.get("distributions", ())))
    if built and int(built[1]) > int(machine.gpu.cuda.partition(".")[0]):
        reason = (
            f"{library.name} is built for CUDA {built[1]}, but the driver supports "
            f"{machine.gpu.cuda}"
        )
        return {reason: "install a newer NVIDIA driver"}
    return {}
