"""ONNX Runtime on the CPU."""

from types import TracebackType
from typing import Self

import onnxruntime

from serving.bundle import Bundle, Tower
from serving.errors import RunnerError
from serving.machine import cpu_count
from serving.runners.base import Batch, Embeddings


class OnnxRuntimeRunner:
    """One exported graph in an ONNX Runtime session with explicit threads."""

    def __init__(
        self, bundle: Bundle, tower: Tower, precision: str, threads: int | None = None
    ) -> None:
        self.name = f"onnxruntime:{precision}"
        self.runtime_version = f"onnxruntime {onnxruntime.__version__}"
        self._bundle = bundle
        self._artifact = bundle.artifact(tower, precision)
        self._threads = threads or cpu_count()
        self._session: onnxruntime.InferenceSession | None = None

    def __enter__(self) -> Self:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = self._bundle.verified(self._artifact)
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            raise RunnerError(f"{self.name}: ONNX Runtime cannot load {path}: {error}") from error
        self._input = self._session.get_inputs()[0].name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None

    def run(self, batch: Batch) -> Embeddings:
        """See `Runner.run`."""
        if self._session is None:
            raise RunnerError(f"{self.name} is not open; use it in a `with` statement")
        try:
            output: Embeddings = self._session.run(None, {self._input: batch})[0]
        except Exception as error:  # see __enter__
            raise RunnerError(
                f"{self.name} cannot run {batch.dtype} {batch.shape}: {error}"
            ) from error
        return output
