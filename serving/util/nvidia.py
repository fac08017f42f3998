"""What NVIDIA GPU this machine has, asked of the driver itself: no CUDA package is needed for that.

Does not know: what can be done with it (`export.doctor.report`, the runners).
"""

import ctypes
import functools
from dataclasses import dataclass

# CUdevice_attribute, cuda.h
_COMPUTE_CAPABILITY = (75, 76)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device, as the driver describes it."""

    name: str
    """Such as `NVIDIA H200`."""
    compute_capability: str
    """Such as `9.0`."""
    memory_bytes: int
    cuda: str
    """The newest CUDA version that the driver runs, such as `13.0`."""


@functools.cache
def gpu() -> Gpu | None:
    """The first GPU that this process may use; None without a driver or a device.

    `CUDA_VISIBLE_DEVICES` holds: the driver itself obeys it.
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
