"""Description of the machine, its libraries and the measured commit."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from serving.util.machine import cpu_count, cpu_info, describe
from serving.util.nvidia import gpu
from serving.util.results import Cpu, Environment

_LIBRARIES = (
    *("torch", "triton", "transformers", "numpy", "pillow", "tokenizers"),
    *("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "nvidia-cudnn-cu13", "openvino"),
    *("tensorrt", "tensorrt_cu13", "tensorrt_rtx", "tensorrt_rtx_cu13_bindings"),
    *("nvidia-pytriton", "tritonclient", "pytest-benchmark"),
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
"""Environment variables that affect the threads of runtimes."""


def environment() -> Environment:
    """Return a description of this machine, its libraries, and the measured commit."""
    model, flags = cpu_info()
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return Environment(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=f"{commit} with changes" if commit and changes else commit,
        machine=describe(),
        cpu=Cpu(
            model=model,
            flags=tuple(sorted(flags)),
            usable=cpu_count(),
            online=os.cpu_count(),
            quota=_quota(),
            governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        ),
        memory_bytes=psutil.virtual_memory().total,
        memory_limit=_read("/sys/fs/cgroup/memory.max"),
        load_average=os.getloadavg(),
        threads={name: os.environ.get(name) for name in _THREADS},
        kernel=platform.release(),
        python=platform.python_version(),
        gpu=gpu(),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        torch_cuda=torch.version.cuda,
        libraries={name: _version(name) for name in _LIBRARIES},
    )


def _quota() -> str | None:
    """Return the CPU quota of the cgroup: `cpu.max` of v2, or `cpu.cfs_*` of v1."""
    v1 = [_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    return _read("/sys/fs/cgroup/cpu.max") or (f"{v1[0]} {v1[1]}" if all(v1) else None)


def _read(file: str) -> str | None:
    with suppress(OSError):
        return Path(file).read_text().strip()
    return None


def _output(*command: str) -> str | None:
    """Return the output of a program, or None if it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        checkout = Path(__file__).parent
        done = subprocess.run(command, cwd=checkout, capture_output=True, timeout=30, check=True)
        return done.stdout.decode().strip()
    return None


def _version(distribution: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None
