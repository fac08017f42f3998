"""Peak rates of this CPU: the fastest matrix product of any installed runtime.

A rate measured with one library is a limit of that library. On CPUs without bfloat16 instructions,
PyTorch multiplies bfloat16 a hundred times slower than float32, and the runtime with the best INT8
kernels depends on the CPU. Each precision is therefore measured with all runtimes, and the best
rate is kept.
"""

from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.machine.timing import once, timed
from serving.util.machine import cpu_count, cpu_info
from serving.util.results import Limits

Call = Callable[[], object]

_SIZES = (1024, 2048)
"""Numbers of rows and columns of the matrices."""
_SLOW_SECONDS = 0.2
"""A product that takes longer than this is not measured."""
_COPY_BYTES = 256 << 20
"""Size of a copy, many times larger than the caches."""


def cpu_limits(rounds: int = 3) -> Limits:
    """Measure this CPU in its current state, with the number of threads that runners use."""
    torch.set_num_threads(cpu_count())
    rates: dict[str, tuple[float, int, str]] = {}
    without = {}
    for precision in ("fp32", "bf16", "int8"):
        for size in _SIZES:
            for library, call in _products(precision, size):
                if once(call)[1] > _SLOW_SECONDS:
                    continue
                rate = 2 * size**3 / median(timed(call, "cpu", rounds)) / 1e12
                rates[precision] = max(rates.get(precision, (0.0, 0, "")), (rate, size, library))
        if precision not in rates:
            without[precision] = "no installed runtime has fast kernels for it on this CPU"
    source = np.random.default_rng(0).integers(0, 256, _COPY_BYTES, np.uint8)
    tensor = torch.from_numpy(source)
    target = torch.empty_like(tensor)
    copied = median(timed(lambda: target.copy_(tensor), "cpu", rounds))
    return Limits(
        matmul_tflops={name: rate for name, (rate, _, _) in rates.items()},
        matmul_size=max((size for _, size, _ in rates.values()), default=0),
        matmul_by={name: f"{by}, {size} x {size}" for name, (_, size, by) in rates.items()},
        copy_gb_per_s=2 * _COPY_BYTES / copied / 1e9,
        copy_bytes=_COPY_BYTES,
        without=without,
    )


def _products(precision: str, size: int) -> Iterator[tuple[str, Call]]:
    """Yield libraries, each with a call that multiplies two square matrices."""
    native = not cpu_info()[1].isdisjoint({"avx512_bf16", "amx_bf16"})
    if precision == "bf16" and not native:
        return  # libraries would compute in float32, or take seconds
    rng = np.random.default_rng(0)
    x = rng.standard_normal((size, size), np.float32)
    if precision != "int8":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = torch.from_numpy(x).to(dtype), torch.from_numpy(x.T.copy()).to(dtype)
        yield "PyTorch", lambda: a @ b
    graph = _graph(size, quantized=precision == "int8").SerializeToString()
    if precision != "bf16":
        yield "ONNX Runtime", _by_onnx_runtime(graph, x)
    try:
        yield "OpenVINO", _by_open_vino(graph, x, "bf16" if precision == "bf16" else "f32")
    except ImportError:
        return


def _by_onnx_runtime(graph: bytes, x: NDArray[np.float32]) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _by_open_vino(graph: bytes, x: NDArray[np.float32], precision: str) -> Call:
    import openvino

    core = openvino.Core()
    settings: dict[str, int | str] = {"INFERENCE_NUM_THREADS": cpu_count(), "NUM_STREAMS": 1}
    settings["INFERENCE_PRECISION_HINT"] = precision
    request = core.compile_model(core.read_model(graph), "CPU", settings).create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)


def _graph(size: int, *, quantized: bool) -> onnx.ModelProto:
    """Return a graph of one product with a constant, quantized as in `export.int8.qdq` or not."""
    rng = np.random.default_rng(1)
    shape = (size, size)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    if quantized:
        constants = {
            "w": rng.integers(-127, 128, shape, np.int8),
            "w_scale": np.full(size, 1 / 32, np.float32),
            "w_zero": np.zeros(size, np.int8),
            "x_scale": np.float32(1 / 32),
            "x_zero": np.int8(0),
        }
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_int8"]),
            helper.make_node("DequantizeLinear", ["x_int8", "x_scale", "x_zero"], ["x_back"]),
            helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_back"], axis=1),
            helper.make_node("MatMul", ["x_back", "w_back"], ["y"]),
        ]
    else:
        constants = {"w": rng.standard_normal(shape, np.float32)}
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weights = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "product", [x], [y], weights)
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)
