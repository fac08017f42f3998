"""ONNX Runtime on the CPU."""

import onnxruntime

from serving.bundle import Bundle, Tower
from serving.errors import RunnerError
from serving.machine import cpu_count
from serving.runners.base import Batch, Embeddings, LoadedRunner


class OnnxRuntimeRunner(LoadedRunner):
    """One exported graph in an ONNX Runtime session with explicit threads."""

    def __init__(
        self, bundle: Bundle, tower: Tower, precision: str, threads: int | None = None
    ) -> None:
        self.name = f"onnxruntime:{precision}"
        self.runtime_version = f"onnxruntime {onnxruntime.__version__}"
        self._bundle = bundle
        self._artifact = bundle.artifact(tower, precision)
        self._threads = threads or cpu_count()

    def _load(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = self._bundle.verified(self._artifact)
        try:
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            raise RunnerError(f"{self.name}: ONNX Runtime cannot load {path}: {error}") from error

    def _infer(self, batch: Batch) -> Embeddings:
        feed = self._loaded.get_inputs()[0].name
        output: Embeddings = self._loaded.run(None, {feed: batch})[0]
        return output
