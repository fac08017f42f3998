"""The number of usable CPUs, and the description of this machine."""

import math
import os
import re

import pytest

from serving.util import machine


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu.max": "", "cpu/cpu.cfs_quota_us": "1\n", "cpu/cpu.cfs_period_us": "2"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "", "cpu/cpu.cfs_period_us": ""}, math.inf),
        ({}, math.inf),
    ],
    ids=str,
)
def test_cgroup_quota_is_read(tmp_path, files, quota):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine._cgroup_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "count"),
    [(8, 2, 2), (8, 1.5, 2), (2, 16, 2), (4, math.inf, 4), (64, 0.1, 1)],
)
def test_cpu_count_is_the_smaller_limit_rounded_up(monkeypatch, affinity, quota, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(machine, "_cgroup_quota", lambda _: quota)
    assert machine.cpu_count.__wrapped__() == count


def test_description_names_cpu_model_and_count():
    assert 1 <= machine.cpu_count() <= os.cpu_count()
    model, flags = machine.cpu_info()
    assert model
    assert all(re.fullmatch(r"\w+", flag) for flag in flags)
    described = machine.describe()
    assert described.startswith(f"{model}, {machine.cpu_count()} CPUs")
    assert ("avx2" in described) == ("avx2" in flags)
