"""The interface through which all runners are run, compared and timed."""

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
    """A context manager that runs one graph: construction is cheap, entering allocates, exit frees.

    A runner that does not get the requested device or precision raises `RunnerError` on entering;
    it never falls back to another one. Runners do not time themselves.
    """

    @property
    def spec(self) -> RunnerSpec:
        """Runtime and precision, such as `onnxruntime:fp32`."""

    @property
    def name(self) -> str:
        """The spec as text, such as `onnxruntime:fp32`."""

    @property
    def runtime_version(self) -> str:
        """Name and version of the library, such as `onnxruntime 1.31.1`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def run(self, batch: Batch) -> Embeddings:
        """Embed `pixels` uint8 [n, 3, size, size] or `input_ids` int32 [n, length].

        Not thread-safe: call it from one thread at a time.

        Returns:
            float32 [n, dim], of unit length.
        """


class LoadedRunner(ABC):
    """Base class of runners around one loaded object, which subclasses load and call."""

    spec: RunnerSpec
    runtime_version: str
    _loaded: Any = None

    @property
    def name(self) -> str:
        """The spec as text, such as `onnxruntime:fp32`."""
        return str(self.spec)

    @abstractmethod
    def _load(self) -> Any:
        """Load the object; raise `RunnerError` if device or precision are not available."""

    @abstractmethod
    def _infer(self, batch: Batch) -> Embeddings:
        """Run `self._loaded` on a batch."""

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
        """Embed a batch, see `Runner.run`.

        Raises:
            RunnerError: the runner is not open, its runtime cannot run this batch, or an embedding
                is not finite.
        """
        if self._loaded is None:
            raise RunnerError(f"{self.name} is not open", advice="use it in a `with` statement")
        try:
            embeddings = self._infer(batch)
        except Exception as error:  # each runtime has its own exception classes
            raise RunnerError(
                f"{self.name} cannot run {batch.dtype} {list(batch.shape)}: {error}"
            ) from error
        if not np.isfinite(embeddings).all():
            bad = ~np.isfinite(embeddings.reshape(len(embeddings), -1)).all(axis=1)
            raise RunnerError(
                f"{bad.sum()} of {len(bad)} embeddings are not finite, the first is {bad.argmax()}",
                runner=self.name,
                advice="use a higher precision",
            )
        return embeddings
