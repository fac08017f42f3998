"""ONNX Runtime: on the CPU, on CUDA, or with TensorRT as its execution provider.

onnxruntime:…           the CPU
onnxruntime-cuda:…      CUDA; what CUDA cannot run, the CPU does
onnxruntime-tensorrt:…  engines that ONNX Runtime builds while it loads the graph, then CUDA
"""

from typing import Any

import onnxruntime

from serving.bundle import Bundle, Graph, Tower
from serving.errors import RunnerError
from serving.machine import cpu_count
from serving.runners.base import PROVIDERS, Batch, Embeddings, LoadedRunner


class OnnxRuntimeRunner(LoadedRunner):
    """One exported graph in an ONNX Runtime session with explicit threads and device."""

    def __init__(
        self,
        bundle: Bundle,
        tower: Tower,
        precision: str,
        runtime: str = "onnxruntime",
        threads: int | None = None,
        graph: Graph = "onnx",
    ) -> None:
        self.name = f"{runtime}:{precision}"
        self.runtime_version = f"onnxruntime {onnxruntime.__version__}"
        self._bundle = bundle
        self._artifact = bundle.artifact(tower, precision, graph)
        self._int8 = precision == "int8"
        self._provider = PROVIDERS[runtime]
        self._threads = threads or cpu_count()

    def _load(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = self._bundle.verified(self._artifact)
        try:
            session = onnxruntime.InferenceSession(
                path,
                options,
                providers=self._providers(),
                # It would join what `export.to_int8` keeps apart.
                disabled_optimizers=["CommonSubexpressionElimination"] if self._int8 else None,
            )
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            raise RunnerError(f"{self.name}: ONNX Runtime cannot load {path}: {error}") from error
        # A provider that cannot start is left out with no more than a line in the log.
        if (got := session.get_providers())[0] != self._provider:
            raise RunnerError(f"{self.name}: asked ONNX Runtime for {self._provider}, got {got}")
        return session

    def _providers(self) -> list[Any]:
        if self._provider == "TensorrtExecutionProvider":
            return [self._provider, "CUDAExecutionProvider", "CPUExecutionProvider"]
        if self._provider == "CUDAExecutionProvider":
            # float32 is to be float32: TF32 has ten bits of mantissa.
            return [(self._provider, {"use_tf32": 0}), "CPUExecutionProvider"]
        return [self._provider]

    def _infer(self, batch: Batch) -> Embeddings:
        feed = self._loaded.get_inputs()[0].name
        output: Embeddings = self._loaded.run(None, {feed: batch})[0]
        return output
