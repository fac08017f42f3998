"""Query the NVIDIA GPU of this machine through the driver, without any CUDA package.

This module does not know what the GPU can be used for (`export.doctor.report`, the runners).
"""

import ctypes
import functools
from dataclasses import dataclass

# CUdevice_attribute, cuda.h
_COMPUTE_CAPABILITY = (75, 76)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, as described by the driver."""

    name: str
    """Product name, such as `NVIDIA H200`."""
    compute_capability: str
    """Compute capability, such as `9.0`."""
    memory_bytes: int
    cuda: str
    """Newest CUDA version that the driver supports, such as `13.0`."""


@functools.cache
def gpu() -> Gpu | None:
    """Return the first GPU that this process may use; None without a driver or a device.

    The driver itself applies `CUDA_VISIBLE_DEVICES`.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in _COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    return Gpu(
        name=name.value.decode(),
        compute_capability=".".join(capability),
        memory_bytes=memory.value,
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )
