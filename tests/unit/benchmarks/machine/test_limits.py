"""Measured limits of a device, and the operations that a tower needs."""

import time
from statistics import median

import pytest
import torch

import benchmarks.machine.limits
import benchmarks.machine.timing
from benchmarks.machine.limits import count_flops, measure_limits, require
from benchmarks.machine.timing import timed
from export.checkpoints.load import load_checkpoint
from serving.errors import RunnerError
from serving.util.nvidia import Gpu

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def clip(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint)).clip


@pytest.fixture(scope="module", autouse=True)
def _short_rounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks.machine.timing, "_WARM_UP_SECONDS", 0.01)
        patch.setattr(benchmarks.machine.timing, "_ROUND_SECONDS", 0.005)
        yield


def test_operation_count_equals_manual_count(clip):
    """Two operations for each element of a product. The last block computes queries for one token
    only."""
    width, mlp, dim, patch, patches = 64, 256, 32, 3 * 8 * 8, 16

    def blocks(tokens):
        first = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
        last = (2 * tokens + 2) * width**2 + 2 * tokens * width + 2 * width * mlp
        return first + last

    image = patches * patch * width + blocks(patches + 1) + width * dim
    assert count_flops(clip.config, "image", 1) == 2 * image
    assert count_flops(clip.config, "image", 5) == 10 * image
    for length in (16, 77):
        text = blocks(length) + width * dim
        assert count_flops(clip.config, "text", 3, length) == 6 * text


def test_times_are_per_call_and_exclude_warm_up():
    calls = []

    def call():
        time.sleep(0.5 if not calls else 0.001)
        calls.append(1)

    seconds = timed(call, "cpu", 5)
    assert len(seconds) == 5
    assert 0.001 <= median(seconds) < 0.1
    assert len(calls) > 10, "a round did not repeat what is short"


def test_limits_of_the_cpu_are_measured():
    limits = measure_limits("cpu", 3, size=64, copy_bytes=1 << 16)
    assert all(rate > 0 for rate in limits.matmul_tflops.values())
    assert set(limits.matmul_tflops) | set(limits.without) == {"fp32", "fp16", "bf16", "int8"}
    assert (limits.matmul_size, limits.copy_bytes) == (64, 1 << 16)
    assert limits.copy_gb_per_s > 0


def test_unsupported_precision_is_reported(monkeypatch):
    monkeypatch.delattr(torch, "_int_mm")
    limits = measure_limits("cpu", 3, size=64, copy_bytes=1 << 10)
    assert "int8" not in limits.matmul_tflops
    assert "_int_mm" in limits.without["int8"]


@without_gpu
def test_torch_without_gpu_support_is_rejected(monkeypatch):
    here = Gpu(name="NVIDIA H200", compute_capability="9.0", memory_bytes=1, cuda="13.0")
    monkeypatch.setattr(benchmarks.machine.limits, "gpu", lambda: here)
    with pytest.raises(RunnerError, match=r"a torch that can use the NVIDIA H200 .* CUDA 13\.0"):
        require("cuda")
    require("cpu")
