"""The machine: number of usable CPUs, and a description that is stored with measurements."""

import contextlib
import functools
import math
import os
import platform
from pathlib import Path


@functools.cache
def cpu_count() -> int:
    """Return the number of CPUs that this process may use: its affinity mask and cgroup quota.

    Containers limit CPU time by a quota (cgroup v2 `cpu.max`, v1 `cpu.cfs_quota_us`), which
    `os.cpu_count` ignores. By default a runtime starts one thread for each core of the host, and
    the threads then throttle each other.
    """
    affinity = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(affinity, _cgroup_quota(Path("/sys/fs/cgroup")))))


def _cgroup_quota(root: Path) -> float:
    v2, v1 = root / "cpu.max", root / "cpu"
    with contextlib.suppress(OSError, ValueError):
        quota, period = v2.read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        limit = int((v1 / "cpu.cfs_quota_us").read_text())
        return math.inf if limit < 0 else limit / int((v1 / "cpu.cfs_period_us").read_text())
    return math.inf


@functools.cache
def cpu_info() -> tuple[str, frozenset[str]]:
    """Return the CPU's model name, and its instruction set flags by their Linux names."""
    model, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return model, flags
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    return facts.get("model name", model), frozenset(facts.get("flags", "").split())


def describe() -> str:
    """Return a description such as `AMD EPYC 9R14, 2 CPUs, avx512f avx512_vnni`."""
    model, flags = cpu_info()
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return ", ".join([model, f"{cpu_count()} CPUs", " ".join(f for f in known if f in flags)])
