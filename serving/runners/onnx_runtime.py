"""Runner for ONNX Runtime with its CPU, CUDA or TensorRT execution provider.

onnxruntime:…           CPU
onnxruntime-cuda:…      CUDA; operators that CUDA does not support run on the CPU
onnxruntime-tensorrt:…  engines that ONNX Runtime builds when it loads the graph; the rest on CUDA
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
    """Runner of an ONNX graph in an ONNX Runtime session with explicit threads and device."""

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
        except Exception as error:  # ONNX Runtime has an exception class for each status code
            raise RunnerError(
                f"ONNX Runtime cannot load {path}: {error}", runner=self.name
            ) from error
        # ONNX Runtime drops a provider that cannot start and only logs a warning.
        if (got := session.get_providers())[0] != self._provider:
            raise RunnerError(
                f"asked ONNX Runtime for {self._provider}, got {got}", runner=self.name
            )
        return session

    def _providers(self) -> list[Any]:
        if self._provider == "TensorrtExecutionProvider":
            return [self._provider, "CUDAExecutionProvider", "CPUExecutionProvider"]
        if self._provider == "CUDAExecutionProvider":
            # TF32, ONNX Runtime's default, has only ten bits of mantissa.
            return [(self._provider, {"use_tf32": 0}), "CPUExecutionProvider"]
        return [self._provider]

    def _infer(self, batch: Batch) -> Embeddings:
        feed = self._loaded.get_inputs()[0].name
        output: Embeddings = self._loaded.run(None, {feed: batch})[0]
        return output


def session_options(threads: int, *, int8: bool) -> onnxruntime.SessionOptions:
    """Return session options that keep other threads fast and INT8 products exact on any x86 CPU.

    Threads wait for work by spinning, which is fast. By default they spin for another 50 ms after a
    run and occupy CPUs that decode the next image, so they are told to stop at the end of a run.

    On CPUs without VNNI, ONNX Runtime's default INT8 products add pairs in 16 bits, which overflow:
    10 x 127 summed 64 times gave 8160 (ONNX Runtime 1.31, AVX2). `session.x64quantprecision`
    selects slower products that do not overflow; other CPUs ignore it. Both options are documented
    in ONNX Runtime's onnxruntime_session_options_config_keys.h.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if int8:
        options.add_session_config_entry("session.x64quantprecision", "1")
        # It would merge the Q/DQ pairs that `export.int8.qdq` creates for each layer.
        disabled = "CommonSubexpressionElimination"
        options.add_session_config_entry("optimization.disable_specified_optimizers", disabled)
    return options
