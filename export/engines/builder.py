"""Building of TensorRT engines from ONNX graphs, for TensorRT 10.13 to 11 and TensorRT-RTX.

Networks are strongly typed: the types in the graph determine the precision of each layer. The only
builder flag that affects results is TF32, which lets matrix products of the float32 graph use TF32.

`serving.bundles.engine_facts` decides whether an engine fits a machine; `export.gate.parity` checks
the embeddings of an engine.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.bundles.engine_facts import SHORT_TEXT, Engine, Library, Profile
from serving.bundles.manifest import Manifest, Tower
from serving.errors import ClipDeployError, ExportError, InputError
from serving.runners.tensor_rt import collecting, load_library
from serving.util.files import write_bytes
from serving.util.nvidia import gpu
from serving.util.progress import Progress

if TYPE_CHECKING:
    import tensorrt as trt

_INPUTS: dict[Tower, str] = {"image": "pixels", "text": "input_ids"}
_OPTIMUM = 16
"""Tuned batch size of all profiles, and tuned text length of the profile for short texts, in
tokens."""


_DEPTH = 1
"""Maximum depth of nested build phases to report. Deeper levels have hundreds of phases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Settings of the engine builder."""

    library: Library = "tensorrt"
    max_batch: int = 64
    workspace_bytes: int = 4 << 30
    """Maximum scratch memory of a kernel."""
    optimization_level: int = 3
    """Effort of the search for fast kernels: 0 builds fastest, 5 searches longest."""
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None
    """File with measured kernel times of this device. A build reads and updates it, so that later
    builds take seconds."""


def profiles_of(tower: Tower, manifest: Manifest, max_batch: int) -> tuple[Profile, ...]:
    """Return the optimization profiles of a tower's engine.

    The image tower has one profile. The text tower has one for short texts and one for longer ones.
    """
    batch = min(_OPTIMUM, max_batch)
    if tower == "image":
        shape = (3, manifest.image.size, manifest.image.size)
        return (Profile(minimum=(1, *shape), optimum=(batch, *shape), maximum=(max_batch, *shape)),)
    context = manifest.text.context_length
    short = min(SHORT_TEXT, context)
    lengths = [(2, min(_OPTIMUM, short), short)]
    if context > short:
        lengths.append((short + 1, context, context))
    return tuple(
        Profile(minimum=(1, low), optimum=(batch, tuned), maximum=(max_batch, high))
        for low, tuned, high in lengths
    )


def build_plan(
    graph: Path,
    graph_sha256: str,
    tower: Tower,
    manifest: Manifest,
    options: EngineOptions,
    progress: Progress,
) -> tuple[bytes, Engine]:
    """Build an engine from one graph.

    TensorRT builds for the GPU of this machine. TensorRT-RTX also builds without a GPU.

    Args:
        graph: an ONNX file of this project.
        graph_sha256: its sha256.
        tower: tower that the graph computes.
        manifest: manifest of the bundle.
        options: settings of the builder.
        progress: called with each build phase.

    Returns:
        The content of the .plan file, and the facts about the engine.

    Raises:
        RunnerError: the library cannot be loaded.
        ExportError: the library does not support the options, or cannot parse or build the graph.
        InputError: the timing cache cannot be read.
    """
    device = gpu()
    _check_options(options, has_gpu=device is not None)
    library = load_library(options.library)
    name, start = f"{options.library} {library.__version__}", time.monotonic()
    messages: deque[str] = deque(maxlen=3)
    logger = collecting(library, messages)
    builder: trt.Builder = library.Builder(logger)
    # Look the flag up by name, because its value differs between TensorRT 10 and 11.
    typed = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network: trt.INetworkDefinition = builder.create_network(typed)
    parser: trt.OnnxParser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)) or not network.num_outputs:
        raise ExportError(f"{name} cannot parse {graph}: {_reasons(parser)}")
    config: trt.IBuilderConfig = builder.create_builder_config()
    _configure(library, config, options)
    profiles = profiles_of(tower, manifest, options.max_batch)
    for profile in profiles:
        shapes: trt.IOptimizationProfile = builder.create_optimization_profile()
        shapes.set_shape(_INPUTS[tower], profile.minimum, profile.optimum, profile.maximum)
        config.add_optimization_profile(shapes)
    # Keep a reference to the monitor: the builder calls it throughout the build.
    stopped: list[BaseException] = []
    monitor = config.progress_monitor = _monitor(library, graph.name, progress, stopped)
    cache = _read_cache(config, options.timing_cache)
    with _interrupts(stopped):
        plan: trt.IHostMemory = builder.build_serialized_network(network, config)
    del monitor
    if stopped:
        raise stopped[0]
    if plan is None:
        raise ExportError(
            f"{name} cannot build {graph}: {'; '.join(messages) or 'it gave no reason'}"
        )
    _write_cache(cache, options.timing_cache, progress)
    tuned = device if options.library == "tensorrt" else None
    return bytes(plan), Engine(
        library=options.library,
        version=str(library.__version__),
        device=tuned.name if tuned else None,
        compute_capability=tuned.compute_capability if tuned else None,
        cuda=device.cuda if device else None,
        profiles=profiles,
        onnx_sha256=graph_sha256,
        build_seconds=round(time.monotonic() - start, 1),
        workspace_bytes=options.workspace_bytes,
        optimization_level=options.optimization_level,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        weights_stripped=options.strip_weights,
    )


def _check_options(options: EngineOptions, *, has_gpu: bool) -> None:
    if options.library == "tensorrt":
        if not has_gpu:
            raise ExportError(
                "TensorRT builds an engine on the GPU that will run it, but this machine has no "
                "NVIDIA GPU or no driver for it",
                advice="build on the machine that will serve the engine, or build for TensorRT-RTX "
                "with --engine tensorrt-rtx, which needs no GPU",
            )
        return
    if options.version_compatible or options.hardware_compatible:
        raise ExportError(
            "TensorRT-RTX engines always run on every RTX GPU, and only with the version of the "
            "library that built them",
            advice="leave out --version-compatible and --hardware-compatible",
        )
    if options.timing_cache:
        raise ExportError(
            "TensorRT-RTX does not time kernels during a build",
            advice="leave out --timing-cache",
        )
    if options.strip_weights and not has_gpu:
        raise ExportError(
            "TensorRT-RTX can strip weights only on a machine with an RTX GPU",
            advice="leave out --strip-weights",
        )


def _reasons(parser: trt.OnnxParser) -> str:
    """Return the errors of the parser, with their nodes."""
    reasons = []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        node = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
        reasons.append(node + error.desc())
    return "; ".join(reasons) or "it contains no graph"


def _configure(library: Any, config: trt.IBuilderConfig, options: EngineOptions) -> None:
    config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.set_flag(library.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(library.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = library.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.strip_weights:
        config.set_flag(library.BuilderFlag.STRIP_PLAN)


def _read_cache(config: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache | None:
    """Set and return the timing cache of `config`, with the measurements of earlier builds."""
    if path is None:
        return None
    try:
        known = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(
            f"the timing cache {path} cannot be read ({error.strerror})",
            advice="name another file with --timing-cache",
        ) from error
    for content in (known, b""):  # start an empty cache if the file is from another device
        cache: trt.ITimingCache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _write_cache(cache: trt.ITimingCache | None, path: Path | None, progress: Progress) -> None:
    if cache is None or path is None:
        return
    measured: trt.IHostMemory = cache.serialize()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, bytes(measured))
    except (OSError, ClipDeployError) as error:  # an engine that took minutes must not be lost
        progress(f"the timing cache was not written: {path}: {error}")


@contextmanager
def _interrupts(stopped: list[BaseException]) -> Iterator[None]:
    """Append a KeyboardInterrupt to `stopped` on Ctrl-C, instead of raising it.

    If a callback raises it, the library prints the exception and may continue the build.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: stopped.append(KeyboardInterrupt()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _monitor(library: Any, name: str, progress: Progress, stopped: list[BaseException]) -> Any:
    """Return an `IProgressMonitor` that reports the outer phases.

    It ends the build as soon as `stopped` holds an exception.
    """

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]  # the base is loaded at run time
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._open: dict[str, tuple[int, int]] = {}  # phase -> depth, steps

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            depth = self._open[parent][0] + 1 if parent in self._open else 0
            self._open[phase] = depth, steps

        def step_complete(self, phase: str, step: int) -> bool:
            depth, steps = self._open[phase]
            try:
                if depth <= _DEPTH:
                    progress(f"{name}: {phase.lower()}", step + 1, steps)
            except BaseException as error:  # build_plan raises it after the library has returned
                stopped.append(error)
            return not stopped

        def phase_finish(self, phase: str) -> None:
            del self._open[phase]

    return Monitor()
