"""The machine, its libraries and the commit that numbers were measured with; what was not."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from serving.util.machine import cpu_count, cpu_info, describe
from serving.util.nvidia import gpu

_LIBRARIES = (
    *("torch", "triton", "transformers", "numpy", "pillow", "tokenizers"),
    *("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "nvidia-cudnn-cu13", "openvino"),
    *("tensorrt", "tensorrt_cu13", "tensorrt_rtx", "tensorrt_rtx_cu13_bindings"),
    *("nvidia-pytriton", "tritonclient", "pytest-benchmark"),
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
"""Variables that change how many threads runtimes start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """What was not measured, or otherwise than planned, and why."""

    what: str
    reason: str


def environment() -> dict[str, object]:
    """This machine, its libraries (null: not installed), and the commit that is measured."""
    device = gpu()
    model, flags = cpu_info()
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": f"{commit} with changes" if commit and changes else commit,
        "machine": describe(),
        "cpu": {
            "model": model,
            "flags": sorted(flags),
            "usable": cpu_count(),
            "online": os.cpu_count(),
            "quota": _quota(),
            "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        },
        "memory": {
            "bytes": psutil.virtual_memory().total,
            "limit": _read("/sys/fs/cgroup/memory.max"),
        },
        "load_average": os.getloadavg(),
        "threads": {name: os.environ.get(name) for name in _THREADS},
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpu": asdict(device) if device else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch_cuda": torch.version.cuda,
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }


def _quota() -> str | None:
    """CPU time that the cgroup allows, as it says it: `cpu.max` of v2, `cpu.cfs_*` of v1."""
    v1 = [_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    return _read("/sys/fs/cgroup/cpu.max") or (f"{v1[0]} {v1[1]}" if all(v1) else None)


def _read(file: str) -> str | None:
    with suppress(OSError):
        return Path(file).read_text().strip()
    return None


def _output(*command: str) -> str | None:
    """Of a program of which only its answer is wanted; None where it has none."""
    with suppress(OSError, subprocess.SubprocessError):
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=30, check=True)
        return done.stdout.decode().strip()
    return None


def _version(distribution: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None
