"""What is known of a TensorRT plan, and whether it fits this machine: asked before it is loaded.

A plan is machine code for one GPU by one version of a library. Beside each lies a JSON with these
facts (`<plan>.json`), and the manifest vouches for both.

Does not know: how plans are made (`export.engines.builder`) or run (`serving.runners.tensor_rt`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from serving.util.nvidia import Gpu

Library = Literal["tensorrt", "tensorrt-rtx"]
LIBRARIES: tuple[Library, Library] = ("tensorrt", "tensorrt-rtx")

MODULES: dict[Library, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
"""What each library is imported as: by its complete package, or by its bindings alone, which take
the shared libraries that a container already has."""

SHORT_TEXT = 32
"""Tokens up to which a text runs by the profile that was tuned for short ones."""

_AMPERE = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Shapes of the input that a plan takes, and the one it was tuned for."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether `shape` lies between minimum and maximum."""
        bounds = zip(self.minimum, shape, self.maximum, strict=True)
        return all(low <= size <= high for low, size, high in bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How a plan came to be."""

    library: Library
    version: str
    """Of the library."""
    device: str | None
    """Name of the GPU it was tuned on; None of TensorRT-RTX, which compiles when it is loaded."""
    compute_capability: str | None
    cuda: str | None
    """Newest CUDA version of the driver it was built under; None without a driver."""
    profiles: tuple[Profile, ...]
    onnx_sha256: str
    """Of the graph it was built from."""
    build_seconds: float
    workspace_bytes: int
    optimization_level: int
    version_compatible: bool = False
    """Loads in later versions of the same major version."""
    hardware_compatible: bool = False
    """Runs on any GPU from Ampere on."""
    weights_stripped: bool = False
    """Holds no weights; they are put in from the graph when it is loaded."""


def mismatches(engine: Engine, onnx_sha256: str, gpu: Gpu | None, version: str | None) -> list[str]:
    """Why a plan cannot be used here; empty if it can.

    Args:
        onnx_sha256: of the bundle's graph of the same tower and precision.
        gpu: of this machine.
        version: of the plan's library on this machine; None if it is not installed.
    """
    return [
        *_graph(engine, onnx_sha256),
        *_version(engine, version),
        *([] if gpu else ["this machine has no NVIDIA GPU"]),
        *(_device(engine, gpu) if gpu and engine.library == "tensorrt" else []),
    ]


def _graph(engine: Engine, onnx_sha256: str) -> list[str]:
    if engine.onnx_sha256 == onnx_sha256:
        return []
    return [
        f"graph: the plan was built from one with sha256 {engine.onnx_sha256[:16]}..., the "
        f"bundle's is {onnx_sha256[:16]}..."
    ]


def _version(engine: Engine, version: str | None) -> list[str]:
    if version is None:
        return [f"library: built by {engine.library} {engine.version}, which is not installed here"]
    built, here = _numbers(engine.version), _numbers(version)
    later = built[:1] == here[:1] and here >= built
    if built == here or (engine.version_compatible and later):
        return []
    return [f"version: built by {engine.library} {engine.version}, this machine has {version}"]


def _device(engine: Engine, gpu: Gpu) -> list[str]:
    here = f"{gpu.name} (compute capability {gpu.compute_capability})"
    if engine.hardware_compatible:
        fits = _numbers(gpu.compute_capability) >= _AMPERE
        return [] if fits else [f"device: built for Ampere and later, this machine has {here}"]
    if (engine.device, engine.compute_capability) == (gpu.name, gpu.compute_capability):
        return []
    built = f"{engine.device} (compute capability {engine.compute_capability})"
    return [f"device: built on {built}, this machine has {here}"]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
