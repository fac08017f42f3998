"""Runner for TensorRT and TensorRT-RTX engines. Uses only cuda-python to access CUDA.

Each input shape has its own execution context and, after its first run, a CUDA graph of the entire
computation: copy pixels or ids to the device, run the tower, copy embeddings back. Replaying a CUDA
graph takes a single launch. The contexts share their scratch memory and run one after the other on
one stream.

This module does not know how engines are built (`export.engines.builder`).
"""

from __future__ import annotations

import ctypes
import importlib
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from serving.bundles.bundle import Bundle
from serving.bundles.engine_facts import MODULES, Engine, Library, Profile, mismatches
from serving.bundles.manifest import Artifact, Tower
from serving.errors import RunnerError
from serving.runners.base import Batch, Embeddings, LoadedRunner
from serving.runners.spec import RunnerSpec, graph_of, runtime_of
from serving.util.extras import install_command
from serving.util.nvidia import gpu

if TYPE_CHECKING:
    import tensorrt as trt

MOST_SHAPES = 64
"""Maximum number of shapes whose contexts and CUDA graphs are kept; the least recently used is
dropped first."""


def load_library(name: Library) -> Any:
    """Import the Python module of TensorRT or TensorRT-RTX.

    Raises:
        RunnerError: the module is not installed, or its shared libraries are not found.
    """
    reasons = []
    for module in MODULES[name]:
        try:
            return importlib.import_module(module)
        except (ImportError, OSError) as error:
            reasons.append(f"import {module}: {error}")
    extra = "gpu" if name == "tensorrt" else "rtx"
    raise RunnerError(
        f"{name} cannot be loaded ({'; '.join(reasons)})",
        advice=f"{install_command(extra)}, or run `clip-deploy doctor` for details",
    )


def library_version(name: Library) -> str | None:
    """Return the version of the installed library; None if it cannot be loaded."""
    try:
        return str(load_library(name).__version__)
    except RunnerError:
        return None


def fitting_plan(bundle: Bundle, tower: Tower, precision: str, library: Library) -> Artifact:
    """Return the engine that can run on this machine.

    Raises:
        BundleError: the bundle has no engine of this tower, precision and library.
        RunnerError: none of them can run here; the message lists each engine's mismatches and the
            command that builds one.
    """
    graph = bundle.artifact(tower, precision).files[0].sha256
    version, device, reasons = library_version(library), gpu(), []
    for artifact in bundle.plans(tower, precision, library):
        assert artifact.engine is not None
        wrong = mismatches(artifact.engine, graph, device, version)
        if not wrong:
            return artifact
        reasons.append(f"{artifact.file}: {'; '.join(wrong)}")
    raise RunnerError(
        f"no {precision} {tower} engine of {bundle.path} can run on this machine.\n"
        + "\n".join(reasons)
        + f"\nBuild it here: {bundle.build_command(precision, library)}"
    )


class TensorRtRunner(LoadedRunner):
    """Runner of one engine on the first GPU.

    Args:
        bundle: bundle with the engine and, if the engine is stripped, the graph with its weights.
        tower: the tower to run.
        spec: a runner of `tensorrt` or `tensorrt-rtx`.
        graphs: whether to capture and replay CUDA graphs.
    """

    def __init__(
        self, bundle: Bundle, tower: Tower, spec: RunnerSpec, *, graphs: bool = True
    ) -> None:
        library = runtime_of(spec).library
        assert library is not None  # holds for all runtimes that run engines
        self.spec = spec
        self.runtime_version = f"{library} {library_version(library)}"
        self._bundle, self._tower, self._library = bundle, tower, library
        self._precision, self._graphs = graph_of(spec), graphs

    def _load(self) -> _Tower:
        library = load_library(self._library)
        artifact = fitting_plan(self._bundle, self._tower, self._precision, self._library)
        plan = self._bundle.verified(artifact)  # before any of its code is executed
        assert artifact.engine is not None
        graph = self._bundle.artifact(self._tower, self._precision)
        stripped = artifact.engine.weights_stripped
        weights = self._bundle.verified(graph) if stripped else None
        engine = deserialize(library, plan, artifact.engine, weights)
        try:
            return _Tower(library, engine, artifact.engine, self._graphs)
        except RuntimeError as error:  # such as out of memory
            raise RunnerError(str(error), runner=self.name) from error

    def _infer(self, batch: Batch) -> Embeddings:
        output: Embeddings = self._loaded.run(batch)
        return output

    def __exit__(self, *error: Any) -> None:
        """Free the memory on the device."""
        if self._loaded is not None:
            self._loaded.close()
        super().__exit__(*error)


def collecting(library: Any, messages: deque[str]) -> Any:
    """Return an `ILogger` that appends errors to `messages` instead of printing them."""

    class Collector(library.ILogger):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.ERROR:
                messages.append(message)

    return Collector()


def deserialize(
    library: Any, plan: Path, facts: Engine, weights: Path | None = None
) -> trt.ICudaEngine:
    """Return an `ICudaEngine` from a verified `.plan` file.

    Args:
        library: module of TensorRT or TensorRT-RTX.
        plan: path of the file.
        facts: build parameters of the engine.
        weights: ONNX graph to refit the weights from, if the engine is stripped.

    Raises:
        RunnerError: the library cannot load the engine; the message has the library's reason.
    """
    content, logger = plan.read_bytes(), library.Logger(library.Logger.ERROR)
    engine = _deserialized(library, logger, content, facts)
    if engine is None:
        # Deserialized again to collect the reason. The first logger is not a Python one, because
        # the library's threads would call it for as long as the engine exists.
        messages: deque[str] = deque(maxlen=3)
        _deserialized(library, collecting(library, messages), content, facts)
        raise RunnerError(
            f"{facts.library} {library.__version__} cannot load {plan}: "
            f"{'; '.join(messages) or 'no reason given'}"
        )
    if weights is not None:
        refitter: trt.Refitter = library.Refitter(engine, logger)
        parser: trt.OnnxParserRefitter = library.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
            raise RunnerError(f"the weights of {weights} do not fit the stripped engine {plan}")
    return engine


def _deserialized(
    library: Any, logger: Any, content: bytes, facts: Engine
) -> trt.ICudaEngine | None:
    runtime: trt.Runtime = library.Runtime(logger)
    # A version-compatible engine contains the runtime that it needs, as host code.
    runtime.engine_host_code_allowed = facts.version_compatible
    engine: trt.ICudaEngine = runtime.deserialize_cuda_engine(content)
    return engine


@dataclass(slots=True)
class _Shape:
    """One input shape, ready to run."""

    context: trt.IExecutionContext
    bytes_in: int
    output: NDArray[np.float32]
    """A view of pinned memory, `[batch, dim]`."""
    graph: Any = None
    """A `cudaGraphExec_t`, once captured."""
    warm: bool = False
    """True after the first run. TensorRT allocates memory in the first run, which must not be
    captured."""


class _Tower:
    """An engine with its memory, its stream, and the contexts of recent shapes."""

    def __init__(self, library: Any, engine: trt.ICudaEngine, facts: Engine, graphs: bool) -> None:
        from cuda.bindings import runtime as cudart

        self._cudart, self._trt, self._engine = cudart, library, engine
        self._facts, self._graphs = facts, graphs
        self._shapes: OrderedDict[tuple[int, ...], _Shape] = OrderedDict()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self._input = next(n for n in names if modes[n] == library.TensorIOMode.INPUT)
        self._output = next(n for n in names if modes[n] == library.TensorIOMode.OUTPUT)
        self._dtype = np.dtype(library.nptype(engine.get_tensor_dtype(self._input)))
        self._dim = int(engine.get_tensor_shape(self._output)[1])
        largest = max(int(np.prod(p.maximum)) for p in facts.profiles) * self._dtype.itemsize
        rows = max(p.maximum[0] for p in facts.profiles)
        self._stream = self._cuda(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self._device, self._pinned = list[Any](), list[Any]()
        sizes = largest, rows * self._dim * 4
        try:
            for size in (*sizes, engine.device_memory_size_v2):
                self._device.append(self._cuda(cudart.cudaMalloc(max(size, 1))))
            for size in sizes:
                flags = cudart.cudaHostAllocDefault
                self._pinned.append(self._cuda(cudart.cudaHostAlloc(size, flags)))
        except RuntimeError:
            self.close()
            raise
        self._host_in = _view(self._pinned[0], largest, np.uint8)
        self._host_out = _view(self._pinned[1], rows * self._dim, np.float32)

    def run(self, batch: Batch) -> Embeddings:
        """Embed `batch`, in parts if it is larger than the engine's largest profile."""
        if batch.dtype != self._dtype:
            raise TypeError(f"expected {self._dtype}, got {batch.dtype}")
        most = max(profile.maximum[0] for profile in self._facts.profiles)
        parts = [self._part(batch[start : start + most]) for start in range(0, len(batch), most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, batch: Batch) -> Embeddings:
        shape = self._shapes.get(batch.shape) or self._new(batch.shape)
        self._shapes.move_to_end(batch.shape)
        self._host_in[: shape.bytes_in] = np.ascontiguousarray(batch).view(np.uint8).ravel()
        cudart = self._cudart
        if shape.graph is not None:
            self._cuda(cudart.cudaGraphLaunch(shape.graph, self._stream))
        elif self._graphs and shape.warm:
            shape.graph = self._captured(shape)
            self._cuda(cudart.cudaGraphLaunch(shape.graph, self._stream))
        else:
            self._enqueue(shape)
        self._cuda(cudart.cudaStreamSynchronize(self._stream))
        shape.warm = True
        return shape.output.copy()  # the pinned memory is overwritten by the next run

    def _new(self, wanted: tuple[int, ...]) -> _Shape:
        number = _profile(self._facts.profiles, wanted)
        engine: trt.ICudaEngine = self._engine
        managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context: trt.IExecutionContext = engine.create_execution_context(managed)
        context.set_device_memory(int(self._device[2]), engine.device_memory_size_v2)
        context.set_optimization_profile_async(number, int(self._stream))
        context.set_input_shape(self._input, wanted)
        context.set_tensor_address(self._input, int(self._device[0]))
        context.set_tensor_address(self._output, int(self._device[1]))
        output = self._host_out[: wanted[0] * self._dim].reshape(wanted[0], self._dim)
        shape = _Shape(context, int(np.prod(wanted)) * self._dtype.itemsize, output)
        self._shapes[wanted] = shape
        if len(self._shapes) > MOST_SHAPES:
            self._drop(self._shapes.popitem(last=False)[1])
        return shape

    def _enqueue(self, shape: _Shape) -> None:
        cudart, context = self._cudart, shape.context
        to_device = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        to_host = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        source, target, stream = self._pinned[0], self._device[0], self._stream
        self._cuda(cudart.cudaMemcpyAsync(target, source, shape.bytes_in, to_device, stream))
        if not context.execute_async_v3(int(stream)):
            raise RuntimeError("TensorRT could not enqueue the batch; see its log for the reason")
        source, target, size = self._device[1], self._pinned[1], shape.output.nbytes
        self._cuda(cudart.cudaMemcpyAsync(target, source, size, to_host, stream))

    def _captured(self, shape: _Shape) -> Any:
        cudart = self._cudart
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            self._enqueue(shape)
        finally:
            graph = self._cuda(cudart.cudaStreamEndCapture(self._stream))
        try:
            return self._cuda(cudart.cudaGraphInstantiate(graph, 0))
        finally:
            self._cuda(cudart.cudaGraphDestroy(graph))

    def _drop(self, shape: _Shape) -> None:
        if shape.graph is not None:
            self._cuda(self._cudart.cudaGraphExecDestroy(shape.graph))

    def close(self) -> None:
        """Free the memory, the CUDA graphs and the stream."""
        cudart = self._cudart
        while self._shapes:
            self._drop(self._shapes.popitem()[1])
        for pointer in self._device:
            self._cuda(cudart.cudaFree(pointer))
        for pointer in self._pinned:
            self._cuda(cudart.cudaFreeHost(pointer))
        self._cuda(cudart.cudaStreamDestroy(self._stream))

    def _cuda(self, result: tuple[Any, ...]) -> Any:
        """Return the value of a CUDA call; raise `RuntimeError` if it failed."""
        status, *values = result
        if status != self._cudart.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA: {self._cudart.cudaGetErrorString(status)[1].decode()}")
        return values[0] if values else None


def _profile(profiles: tuple[Profile, ...], shape: tuple[int, ...]) -> int:
    for number, profile in enumerate(profiles):
        if len(profile.minimum) == len(shape) and profile.takes(shape):
            return number
    ranges = ", ".join(f"{list(p.minimum)} to {list(p.maximum)}" for p in profiles)
    raise ValueError(f"the engine accepts shapes from {ranges}")


def _view(pointer: Any, count: int, dtype: Any) -> NDArray[Any]:
    """Return pinned host memory as an array."""
    size = count * np.dtype(dtype).itemsize
    view: NDArray[Any] = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(int(pointer)))
    return view.view(dtype)
