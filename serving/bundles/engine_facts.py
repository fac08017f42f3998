"""Facts of TensorRT engines, checked against this machine before an engine is loaded.

An engine is machine code for one GPU, built by one version of a library. Each `.plan` file has a
JSON sidecar with these facts (`<name>.plan.json`), and the manifest lists both files.

This module does not know how engines are built (`export.engines.builder`) or run
(`serving.runners.tensor_rt`).
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
"""Importable modules of each library: the complete package, or the bindings alone, which use the
shared libraries that a container image already has."""

SHORT_TEXT = 32
"""Maximum length, in tokens, of texts that use the optimization profile tuned for short texts."""

_AMPERE = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """An optimization profile: the input shapes it covers, and the shape it is tuned for."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def takes(self, shape: Sequence[int]) -> bool:
        """Return whether every dimension of `shape` lies between minimum and maximum."""
        bounds = zip(self.minimum, shape, self.maximum, strict=True)
        return all(low <= size <= high for low, size, high in bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The build parameters of an engine."""

    library: Library
    version: str
    """Version of the library."""
    device: str | None
    """Name of the GPU it was tuned on; None for TensorRT-RTX, which compiles at load time."""
    compute_capability: str | None
    cuda: str | None
    """Newest CUDA version that the driver supported at build time; None without a driver."""
    profiles: tuple[Profile, ...]
    onnx_sha256: str
    """sha256 of the ONNX graph that it was built from."""
    build_seconds: float
    workspace_bytes: int
    optimization_level: int
    version_compatible: bool = False
    """True if later versions with the same major version can load it."""
    hardware_compatible: bool = False
    """True if it runs on any GPU of the Ampere generation or later."""
    weights_stripped: bool = False
    """True if it contains no weights; they are refitted from the ONNX graph at load time."""


def mismatches(engine: Engine, onnx_sha256: str, gpu: Gpu | None, version: str | None) -> list[str]:
    """Return the reasons why an engine cannot run on this machine; empty if it can.

    Args:
        engine: facts of the engine.
        onnx_sha256: sha256 of the bundle's ONNX graph of the same tower and precision.
        gpu: GPU of this machine.
        version: installed version of the engine's library; None if it is not installed.
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
        f"graph: the engine was built from a graph with sha256 {engine.onnx_sha256[:16]}..., the "
        f"bundle's has {onnx_sha256[:16]}..."
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
