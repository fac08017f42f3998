"""The one interface everything that computes embeddings is run, compared and timed through."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from serving.errors import RunnerError
from serving.runners.spec import RunnerSpec

Batch = NDArray[np.uint8] | NDArray[np.int32]
Embeddings = NDArray[np.float32]


class Runner(Protocol):
    """One tower, ready to run: construction is cheap, entering allocates, leaving frees.

    A runner that does not get the device or the precision it was asked for raises `RunnerError`
    on entering; it never falls back to another. Timing stays outside.
    """

    @property
    def spec(self) -> RunnerSpec:
        """Runtime and precision, such as `onnxruntime:fp32`."""

    @property
    def name(self) -> str:
        """The spec as text."""

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

    spec: RunnerSpec
    runtime_version: str
    _loaded: Any = None

    @property
    def name(self) -> str:
        """The spec as text, such as `onnxruntime:fp32`."""
        return str(self.spec)

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
