"""The one interface everything that computes embeddings is run, compared and timed through."""

from types import TracebackType
from typing import Protocol, Self

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


RUNTIMES = ("onnxruntime",)
"""Runtimes of exported graphs. Their libraries are imported only when one is asked for."""


def open_runner(bundle: Bundle, tower: Tower, name: str) -> Runner:
    """The runner called `name`, `<runtime>:<precision>`, of one tower of `bundle`; not yet entered.

    Raises:
        RunnerError: there is no such runtime.
        BundleError: the bundle has no such precision, or its file is not the exported one.
    """
    runtime, _, precision = name.partition(":")
    match runtime:
        case "onnxruntime":
            from serving.runners.onnx_runtime import OnnxRuntimeRunner

            return OnnxRuntimeRunner(bundle, tower, precision)
        case _:
            raise RunnerError(
                f"unknown runner {name!r}; expected <runtime>:<precision> with a runtime of "
                f"{', '.join(RUNTIMES)}, such as onnxruntime:fp32"
            )
