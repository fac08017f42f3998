"""The one interface everything that computes embeddings is run, compared and timed through."""

import importlib.util
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from serving.bundles.bundle import Artifact, Bundle, Graph, Tower
from serving.bundles.engine_facts import LIBRARIES, MODULES, Library
from serving.errors import RunnerError
from serving.util.nvidia import gpu

Batch = NDArray[np.uint8] | NDArray[np.int32]
Embeddings = NDArray[np.float32]


class Runner(Protocol):
    """One tower, ready to run: construction is cheap, entering allocates, leaving frees.

    A runner that does not get the device or the precision it was asked for raises `RunnerError`
    on entering; it never falls back to another. Timing stays outside.
    """

    @property
    def name(self) -> str:
        """Such as `onnxruntime:fp32`."""

    @property
    def runtime_version(self) -> str:
        """Of the library underneath, such as `onnxruntime 1.31.1`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def run(self, batch: Batch) -> Embeddings:
        """`pixels` uint8 [n, 3, size, size] or `input_ids` int32 [n, length] -> float32 [n, dim].

        Embeddings have unit length. Safe to call from one thread at a time.
        """


class LoadedRunner(ABC):
    """A `Runner` around one loaded object; what a runtime adds is how to load it and call it."""

    name: str
    runtime_version: str
    _loaded: Any = None

    @abstractmethod
    def _load(self) -> Any:
        """Allocate; raises `RunnerError` when device or precision are not to be had."""

    @abstractmethod
    def _infer(self, batch: Batch) -> Embeddings:
        """Run `self._loaded`."""

    def __enter__(self) -> Self:
        self._loaded = self._load()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loaded = None

    def run(self, batch: Batch) -> Embeddings:
        """See `Runner.run`.

        Raises:
            RunnerError: the runner is not open, or its runtime cannot run this batch.
        """
        if self._loaded is None:
            raise RunnerError(f"{self.name} is not open; use it in a `with` statement")
        try:
            return self._infer(batch)
        except Exception as error:  # each runtime has classes of its own
            raise RunnerError(
                f"{self.name} cannot run {batch.dtype} {list(batch.shape)}: {error}"
            ) from error


RUNNERS = {
    "onnxruntime:fp32": "fp32",
    "onnxruntime:fp16": "fp16",
    "onnxruntime:int8": "int8",
    "onnxruntime:int8-fp16": "int8-fp16",
    "onnxruntime:int8-dynamic": "int8-dynamic",
    "onnxruntime-cuda:fp32": "fp32",
    "onnxruntime-cuda:fp16": "fp16",
    "onnxruntime-cuda:int8": "int8",
    "onnxruntime-cuda:int8-fp16": "int8-fp16",
    "onnxruntime-tensorrt:fp16": "fp16",
    "onnxruntime-tensorrt:int8": "int8",
    "onnxruntime-tensorrt:int8-fp16": "int8-fp16",
    "openvino:fp32": "fp32",
    "openvino:bf16": "fp32",
    "openvino:fp16": "fp16",
    "openvino:int8": "int8",
    "tensorrt:tf32": "fp32",
    "tensorrt:fp16": "fp16",
    "tensorrt:int8": "int8",
    "tensorrt:int8-fp16": "int8-fp16",
    "tensorrt-rtx:tf32": "fp32",
    "tensorrt-rtx:fp16": "fp16",
    "tensorrt-rtx:int8": "int8",
    "tensorrt-rtx:int8-fp16": "int8-fp16",
}
"""Runners, `<runtime>:<precision>`, and the precision of the graph each of them runs, or of the one
that its plan was built from."""

_PACKAGES = {
    "onnxruntime": (("onnxruntime",), "-e '.[embedded]'"),
    "onnxruntime-cuda": (("onnxruntime",), "onnxruntime-gpu"),
    "onnxruntime-tensorrt": (("onnxruntime",), "onnxruntime-gpu"),
    "openvino": (("openvino",), "-e '.[embedded]'"),
    "tensorrt": (MODULES["tensorrt"], "-e '.[gpu]'"),
    "tensorrt-rtx": (MODULES["tensorrt-rtx"], "-e '.[rtx]'"),
}
"""What each runtime is imported as, one of several, and what `pip install` takes to have it."""

TREE_RUNTIMES = ("onnxruntime", "openvino")
"""That run the tree graph of the text tower: it has an axis whose length is known only then."""

PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
"""Execution provider of each runtime that is ONNX Runtime."""


def missing(name: str) -> str | None:
    """Why the runner `name` cannot be had in this environment, or None."""
    runtime = name.partition(":")[0]
    packages, install = _PACKAGES[runtime]
    if all(map(_absent, packages)):
        return f"the package {packages[0]} is not installed; pip install {install}"
    if runtime in ("onnxruntime", "openvino"):
        return None
    if runtime in LIBRARIES and _absent("cuda.bindings"):
        return "the package cuda.bindings is not installed; pip install cuda-bindings"
    if gpu() is None:
        return "this machine has no NVIDIA GPU, or no driver for it"
    if runtime in PROVIDERS:
        import onnxruntime

        if PROVIDERS[runtime] not in onnxruntime.get_available_providers():
            return f"this ONNX Runtime has no {PROVIDERS[runtime]}; pip install {install}"
    return None


def _absent(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # of a parent package
        return True


def graph_of(name: str) -> str:
    """The precision of the graph behind runner `name`.

    Raises:
        RunnerError: there is no such runner.
    """
    if name not in RUNNERS:
        raise RunnerError(f"unknown runner {name!r}; expected one of {', '.join(RUNNERS)}")
    return RUNNERS[name]


def library_of(name: str) -> Library | None:
    """The library whose plans runner `name` runs; None of a runner of graphs."""
    runtime = name.partition(":")[0]
    return next((library for library in LIBRARIES if library == runtime), None)


def runners_of(artifact: Artifact) -> list[str]:
    """Names of the runners that can run `artifact`, had here or not."""
    library = artifact.engine.library if artifact.engine else None
    if artifact.kind == "torchscript":
        return []
    names = [n for n, p in RUNNERS.items() if p == artifact.precision and library_of(n) == library]
    if artifact.kind == "tree":
        return [name for name in names if name.partition(":")[0] in TREE_RUNTIMES]
    return names


def open_runner(bundle: Bundle, tower: Tower, name: str, graph: Graph = "onnx") -> Runner:
    """The runner called `name`, `<runtime>:<precision>`, of one tower of `bundle`; not yet entered.

    Of the tree graph it takes batches of trees; `text_tree.open_text_tree` makes them.

    Raises:
        RunnerError: there is no such runner, or not in this environment, or not of this graph.
        BundleError: the bundle has no such precision, or its file is not the exported one.
    """
    graph_of(name)
    if reason := missing(name):
        raise RunnerError(f"{name}: {reason}")
    runtime, _, precision = name.partition(":")
    if graph == "tree" and runtime not in TREE_RUNTIMES:
        raise RunnerError(f"{name} runs no trees; expected one of {', '.join(TREE_RUNTIMES)}")
    if runtime == "openvino":
        from serving.runners.open_vino import OpenVinoRunner

        return OpenVinoRunner(bundle, tower, precision, graph=graph)
    if library := library_of(name):
        from serving.runners.tensor_rt import TensorRtRunner

        return TensorRtRunner(bundle, tower, library, precision)
    from serving.runners.onnx_runtime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle, tower, precision, runtime, graph=graph)
