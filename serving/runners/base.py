"""The one interface everything that computes embeddings is run, compared and timed through."""

import importlib.util
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from serving.bundle import Bundle, Tower
from serving.errors import RunnerError

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
    "onnxruntime:int8-dynamic": "int8-dynamic",
    "openvino:fp32": "fp32",
    "openvino:bf16": "fp32",
    "openvino:fp16": "fp16",
    "openvino:int8": "int8",
}
"""Runners of exported graphs, `<runtime>:<precision>`, and the graph each of them runs."""

_LIBRARIES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


def missing(name: str) -> str | None:
    """Why the runner `name` cannot be had in this environment, or None."""
    library = _LIBRARIES[name.partition(":")[0]]
    if importlib.util.find_spec(library) is None:
        return f"the package {library} is not installed; pip install -e '.[embedded]'"
    return None


def graph_of(name: str) -> str:
    """The precision of the graph that runner `name` runs.

    Raises:
        RunnerError: there is no such runner.
    """
    if name not in RUNNERS:
        raise RunnerError(f"unknown runner {name!r}; expected one of {', '.join(RUNNERS)}")
    return RUNNERS[name]


def open_runner(bundle: Bundle, tower: Tower, name: str) -> Runner:
    """The runner called `name`, `<runtime>:<precision>`, of one tower of `bundle`; not yet entered.

    Raises:
        RunnerError: there is no such runner, or not in this environment.
        BundleError: the bundle has no such precision, or its file is not the exported one.
    """
    graph_of(name)
    if reason := missing(name):
        raise RunnerError(f"{name}: {reason}")
    runtime, _, precision = name.partition(":")
    if runtime == "openvino":
        from serving.runners.open_vino import OpenVinoRunner

        return OpenVinoRunner(bundle, tower, precision)
    from serving.runners.onnx_runtime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle, tower, precision)
