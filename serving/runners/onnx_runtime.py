"""ONNX Runtime: on the CPU, on CUDA, or with TensorRT as its execution provider.

onnxruntime:…           the CPU
onnxruntime-cuda:…      CUDA; what CUDA cannot run, the CPU does
onnxruntime-tensorrt:…  engines that ONNX Runtime builds while it loads the graph, then CUDA
"""

from typing import Any

import onnxruntime

from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Graph
from serving.errors import RunnerError
from serving.runners.base import Batch, Embeddings, LoadedRunner
from serving.runners.spec import RunnerSpec, graph_of, runtime_of
from serving.util.machine import cpu_count


class OnnxRuntimeRunner(LoadedRunner):
    """One exported graph in an ONNX Runtime session with explicit threads and device."""

    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        spec: RunnerSpec,
        threads: int | None = None,
    ) -> None:
        self.spec = spec
        self.runtime_version = f"onnxruntime {onnxruntime.__version__}"
        self._bundle = bundle
        self._artifact = bundle.artifact(graph, graph_of(spec))
        self._int8 = spec.precision.startswith("int8")
        self._provider = runtime_of(spec).provider
        self._threads = threads or cpu_count()

    def _load(self) -> onnxruntime.InferenceSession:
        options = session_options(self._threads, int8=self._int8)
        path = self._bundle.verified(self._artifact)
        try:
            session = onnxruntime.InferenceSession(path, options, providers=self._providers())
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


def session_options(threads: int, *, int8: bool) -> onnxruntime.SessionOptions:
    """Options under which an INT8 graph is fast and its products exact on every x86 CPU.

    Threads wait for work by spinning, which is fast, and go on for 50 ms after a run unless they
    are told to stop: on CPUs that the next picture is to be decoded on.

    Without VNNI, ONNX Runtime's default products add pairs in 16 bits, which overflow: 10 x 127
    summed 64 times came to 8160 (ONNX Runtime 1.31, AVX2). The slower products that are asked for
    do not, and other CPUs ignore that. Both options are told of in ONNX Runtime's
    onnxruntime_session_options_config_keys.h.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if int8:
        options.add_session_config_entry("session.x64quantprecision", "1")
        # It would join what `export.int8.qdq` keeps apart.
        joins = "CommonSubexpressionElimination"
        options.add_session_config_entry("optimization.disable_specified_optimizers", joins)
    return options
