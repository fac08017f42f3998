"""Runner for OpenVINO on the CPU, usually the fastest CPU runtime.

openvino:fp32   the fp32 graph in float32
openvino:bf16   the fp32 graph with matrix products in bfloat16, on CPUs that support it
openvino:fp16   the fp16 graph; its weights are converted to float32 at compile time
openvino:int8   the int8 graph; layers that are not quantized use bfloat16 if the CPU supports it
"""

from typing import Any

import numpy as np
import openvino

from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Graph
from serving.errors import RunnerError
from serving.runners.base import Batch, Embeddings, LoadedRunner
from serving.runners.spec import RunnerSpec, graph_of
from serving.util.machine import cpu_count


class OpenVinoRunner(LoadedRunner):
    """Runner of an ONNX graph, compiled for this CPU with explicit threads and precision."""

    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        spec: RunnerSpec,
        threads: int | None = None,
    ) -> None:
        self.spec = spec
        self.runtime_version = f"openvino {openvino.__version__.split('-')[0]}"
        self._bundle = bundle
        self._artifact = bundle.artifact(graph, graph_of(spec))
        self._precision = spec.precision
        self._threads = threads or cpu_count()

    def _load(self) -> Any:
        path = self._bundle.verified(self._artifact)
        core = openvino.Core()
        hint = self._hint(core)
        try:
            compiled = core.compile_model(
                core.read_model(path),
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": hint,
                    "INFERENCE_NUM_THREADS": self._threads,
                    "NUM_STREAMS": 1,
                },
            )
        except RuntimeError as error:
            raise RunnerError(f"OpenVINO cannot load {path}: {error}", runner=self.name) from error
        if (got := compiled.get_property("INFERENCE_PRECISION_HINT").to_string()) != hint:
            raise RunnerError(f"asked OpenVINO for {hint}, and got {got}", runner=self.name)
        return compiled.create_infer_request()

    def _infer(self, batch: Batch) -> Embeddings:
        # Copied, because the next run overwrites the request's memory.
        output: Embeddings = np.array(self._loaded.infer([batch], share_inputs=True)[0])
        return output

    def _hint(self, core: Any) -> str:
        bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if self._precision == "bf16" and not bf16:
            raise RunnerError(
                "this CPU has no bfloat16 (avx512_bf16 or amx_bf16)",
                runner=self.name,
                advice="use openvino:fp32 or openvino:int8",
            )
        return "bf16" if bf16 and self._precision in ("bf16", "int8") else "f32"
