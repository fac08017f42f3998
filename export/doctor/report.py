"""What this machine has, what can therefore be built and served, and what mends the rest.

Does not know: how a package is tried (`export.doctor.installed`), how the report is asked for.
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
"""What it is about, why it is not possible, what to do about that."""

Obstacles = dict[str, str]
"""Why something is not possible, and what to do about each reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The hardware, as far as it decides what runs and how fast."""

    python: str
    cpu: str
    cpus: int
    """That this process may use."""
    int8: str
    """Instructions that make INT8 fast: AMX, VNNI or none."""
    bf16: bool
    """Whether the CPU has instructions for bfloat16."""
    memory_bytes: int
    """That this process may use."""
    gpu: Gpu | None
    nvidia_driver: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """What people do with this project."""

    name: str
    possible: bool
    why: tuple[str, ...]
    """It is not possible."""
    mend: tuple[str, ...]
    """What to do about it: all of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """All there is to tell."""

    machine: Machine
    software: tuple[Software, ...]
    abilities: tuple[Ability, ...]
    runners: tuple[Ability, ...]


def examine() -> DoctorReport:
    """Look at this machine."""
    machine = _machine()
    software = (*packages(), embedded(), *programs())
    installed = {one.name: one for one in software}
    return DoctorReport(
        machine=machine,
        software=software,
        abilities=tuple(_ability(n, o) for n, o in _obstacles(machine, installed).items()),
        runners=tuple(
            _ability(str(spec), _obstacles_of(spec, machine, installed)) for spec in RUNNERS
        ),
    )


def memory_limit(root: Path, own: Path) -> int:
    """Bytes that there are, or that the cgroups (v1, v2) at `root` and named by `own` allow."""
    limits = [psutil.virtual_memory().total]
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        v1 = "memory" in controllers.split(",")
        file = "memory.limit_in_bytes" if v1 else "memory.max"
        group = (root / "memory" if v1 else root) / path.lstrip("/")
        for directory in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such file; `max`
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
    """What keeps us from each ability."""
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
    broken = [one for one in needed if installed[one].state == "broken"]
    if broken:  # `missing` sees only that they are installed, or falls over them
        return obstacles | _lacking(installed, broken)
    error = missing(runner)
    if error is not None and (error.advice or not obstacles):  # else it is the GPU
        obstacles[error.reason] = error.advice
    works = library.state == "works"
    if runner.precision == "bf16" and works and "BF16" not in library.facts["cpu"]:
        obstacles["this CPU has no bfloat16 (avx512_bf16, amx_bf16)"] = "use fp32 or int8"
    return obstacles


def _lacking(installed: Installed, names: Iterable[str], install: str | None = None) -> Obstacles:
    """When all `names` are needed; `install` brings every one that is missing."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for one in (installed[name] for name in names):
        if one.state == "missing":
            lacking.setdefault(("not installed", install or one.mend or ""), []).append(one.name)
        elif one.state == "broken":
            lacking.setdefault(("installed but broken", one.mend or ""), []).append(one.name)
    return {f"{what}: {', '.join(names)}": mend for (what, mend), names in lacking.items()}


def _lacking_all(
    installed: Installed, names: Sequence[str], install: str | None = None
) -> Obstacles:
    """When one of `names` is enough; `install` brings one."""
    if any(installed[name].state == "works" for name in names):
        return {}
    mend = install or ", or ".join(dict.fromkeys(installed[name].mend or "" for name in names))
    return {f"neither {' nor '.join(names)} works": mend}


def _no_gpu(machine: Machine, library: Software) -> Obstacles:
    """For what runs on a GPU by `library`."""
    if machine.gpu is None and machine.nvidia_driver is None:
        return {"no NVIDIA GPU": "needs an NVIDIA GPU and its driver"}
    if machine.gpu is None:
        why = f"NVIDIA driver {machine.nvidia_driver} shows this process no GPU"
        return {why: "look at CUDA_VISIBLE_DEVICES; start a container with --gpus all"}
    built = re.search(r"-cu(\d+)", " ".join(library.facts.get("distributions", ())))
    if built and int(built[1]) > int(machine.gpu.cuda.partition(".")[0]):
        why = f"{library.name} is built for CUDA {built[1]}, the driver runs {machine.gpu.cuda}"
        return {why: "install a newer NVIDIA driver"}
    return {}
