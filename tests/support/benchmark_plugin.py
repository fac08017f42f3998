"""A pytest plugin for benchmark runs: measures device limits quickly and, with SLOWER, slows down
one runner."""

import os
import time

import benchmarks.machine.cpu_limits
from serving.runners.onnx_runtime import OnnxRuntimeRunner

benchmarks.machine.cpu_limits._SIZES = (64,)
benchmarks.machine.cpu_limits._COPY_BYTES = 1 << 20

if "SLOWER" in os.environ:
    infer = OnnxRuntimeRunner._infer

    def slower(self, batch):
        start = time.perf_counter()
        found = infer(self, batch)
        time.sleep(float(os.environ["SLOWER"]) * (time.perf_counter() - start))
        return found

    OnnxRuntimeRunner._infer = slower
