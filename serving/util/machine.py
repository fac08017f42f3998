"""What this machine is: how many CPUs we may use, and a name for it beside measured numbers."""

import contextlib
import functools
import math
import os
import platform
from pathlib import Path


@functools.cache
def cpu_count() -> int:
    """CPUs this process may use: its affinity mask, and no more than its cgroup's quota.

    Containers limit CPU time by quota (cgroup v2 `cpu.max`, v1 `cpu.cfs_quota_us`), which
    `os.cpu_count` does not see: a runtime left to itself starts a thread for every core of the
    host, and they then throttle each other.
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
    """The CPU's model name, and its instruction set flags as Linux names them."""
    model, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return model, flags
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    return facts.get("model name", model), frozenset(facts.get("flags", "").split())


def describe() -> str:
    """Such as `AMD EPYC 9R14, 2 CPUs, avx512f avx512_vnni`."""
    model, flags = cpu_info()
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return ", ".join([model, f"{cpu_count()} CPUs", " ".join(f for f in known if f in flags)])
