"""Measured peak rates of a device, and the counted operations of a tower."""

import functools
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine.timing import timed
from export.checkpoints.architectures import OPENAI_MEAN, OPENAI_STD
from export.gate.torch_runners import allow_tf32
from export.towers.clip import Clip, ClipConfig
from serving.bundles.manifest import Tower
from serving.errors import RunnerError
from serving.util.nvidia import gpu
from serving.util.results import Limits

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def measure_limits(
    device: str, rounds: int = 9, *, size: int = 8192, copy_bytes: int = 2 << 30
) -> Limits:
    """Measure `device` in its current state (clocks, temperature, other users)."""
    rates, without = {}, {}
    for precision in PRECISIONS:
        if precision == "tf32" and torch.device(device).type != "cuda":
            continue
        try:
            seconds = timed(_product(precision, size, device), device, rounds)
        except (RuntimeError, AttributeError) as error:  # AttributeError: no torch._int_mm
            without[precision] = str(error).splitlines()[0]
        else:
            rates[precision] = 2 * size**3 / median(seconds) / 1e12
    if torch.device(device).type == "cuda":
        copy_bytes = min(copy_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, rounds)
    return Limits(
        matmul_tflops=rates,
        matmul_size=size,
        copy_gb_per_s=2 * copy_bytes / median(seconds) / 1e9,
        copy_bytes=copy_bytes,
        without=without,
        matmul_by={},
    )


def _product(precision: str, size: int, device: str) -> Callable[[], Tensor]:
    if precision == "int8":
        shape, dtype = (size, size), torch.int8
        a, b = (torch.randint(-127, 128, shape, dtype=dtype, device=device) for _ in "ab")
        # cuBLASLt has INT8 kernels for a column-major second factor.
        return lambda: torch._int_mm(a, b.t())
    real = _DTYPES.get(precision, torch.float32)
    x, y = (torch.randn(size, size, device=device).to(real) for _ in "xy")

    def product() -> Tensor:
        allow_tf32(precision == "tf32")
        return x @ y

    return product


def require(device: str) -> None:
    """Check that PyTorch can use `device`.

    Raises:
        RunnerError: it cannot; the message says what to do.
    """
    if torch.device(device).type != "cuda" or torch.cuda.is_available():
        return
    here = gpu()
    if here is None:
        raise RunnerError(
            "expected a machine with an NVIDIA GPU; this one has none, or no driver for it",
            advice="check with `nvidia-smi`, or use --device cpu",
        )
    built = torch.version.cuda
    raise RunnerError(
        f"expected a torch that can use the {here.name} of this machine, whose driver supports "
        f"CUDA {here.cuda}; torch {torch.__version__} was built "
        f"{f'for CUDA {built}' if built else 'without CUDA'}",
        advice="install another build of torch",
    )


@functools.cache
def count_flops(config: ClipConfig, tower: Tower, batch: int, length: int | None = None) -> int:
    """Return the floating-point operations of one run of a tower; a multiply-add counts as two.

    PyTorch counts operations of products, convolutions and attention. The tower runs on the `meta`
    device, where attention consists of products; the fused attention of CPUs would not be counted.
    """
    with torch.device("meta"):
        clip = Clip(config, OPENAI_MEAN, OPENAI_STD).eval()
        size = config.image.image_size
        module = clip.image if tower == "image" else clip.text
        shape = (batch, 3, size, size) if tower == "image" else (batch, length or 0)
        example = torch.zeros(shape, dtype=torch.uint8 if tower == "image" else torch.int32)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(example)
    return int(counter.get_total_flops())
