"""The table of runners: names, `<runtime>:<precision>`, and the graph that each of them runs."""

from serving.bundles.engine_facts import LIBRARIES, Library
from serving.bundles.manifest import Artifact
from serving.errors import RunnerError

RUNNERS = {
    "onnxruntime:fp32": "fp32",
    "onnxruntime:fp16": "fp16",
    "onnxruntime:int8": "int8",
    "onnxruntime:int8-fp16": "int8-fp16",
    "onnxruntime:int8-dynamic": "int8-dynamic",
    "onnxruntime-cuda:fp32": "fp32",
    "onnxruntime-cuda:fp16": "fp16",
    "onnxruntime-cuda:int8": "int8",
    "onnxruntime-cuda:int8-fp16": "int8-fp16",
    "onnxruntime-tensorrt:fp16": "fp16",
    "onnxruntime-tensorrt:int8": "int8",
    "onnxruntime-tensorrt:int8-fp16": "int8-fp16",
    "openvino:fp32": "fp32",
    "openvino:bf16": "fp32",
    "openvino:fp16": "fp16",
    "openvino:int8": "int8",
    "tensorrt:tf32": "fp32",
    "tensorrt:fp16": "fp16",
    "tensorrt:int8": "int8",
    "tensorrt:int8-fp16": "int8-fp16",
    "tensorrt-rtx:tf32": "fp32",
    "tensorrt-rtx:fp16": "fp16",
    "tensorrt-rtx:int8": "int8",
    "tensorrt-rtx:int8-fp16": "int8-fp16",
}
"""Runners, `<runtime>:<precision>`, and the precision of the graph each of them runs, or of the one
that its plan was built from."""

TREE_RUNTIMES = ("onnxruntime", "openvino")
"""That run the tree graph of the text tower: it has an axis whose length is known only then."""

PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
"""Execution provider of each runtime that is ONNX Runtime."""


def graph_of(name: str) -> str:
    """The precision of the graph behind runner `name`.

    Raises:
        RunnerError: there is no such runner.
    """
    if name not in RUNNERS:
        raise RunnerError(f"unknown runner {name!r}; expected one of {', '.join(RUNNERS)}")
    return RUNNERS[name]


def library_of(name: str) -> Library | None:
    """The library whose plans runner `name` runs; None of a runner of graphs."""
    runtime = name.partition(":")[0]
    return next((library for library in LIBRARIES if library == runtime), None)


def runners_of(artifact: Artifact) -> list[str]:
    """Names of the runners that can run `artifact`, had here or not."""
    library = artifact.engine.library if artifact.engine else None
    if artifact.kind == "torchscript":
        return []
    names = [n for n, p in RUNNERS.items() if p == artifact.precision and library_of(n) == library]
    if artifact.kind == "tree":
        return [name for name in names if name.partition(":")[0] in TREE_RUNTIMES]
    return names
