"""Opens runners by name, and says why one cannot be had in this environment.

The runtimes are imported only when one of their runners is opened.
"""

import importlib.util

from serving.bundles.bundle import Bundle
from serving.bundles.engine_facts import LIBRARIES, MODULES
from serving.bundles.manifest import Graph, Tower
from serving.errors import RunnerError
from serving.runners.base import Runner
from serving.runners.spec import PROVIDERS, TREE_RUNTIMES, graph_of, library_of
from serving.util.nvidia import gpu

_PACKAGES = {
    "onnxruntime": (("onnxruntime",), "-e '.[embedded]'"),
    "onnxruntime-cuda": (("onnxruntime",), "onnxruntime-gpu"),
    "onnxruntime-tensorrt": (("onnxruntime",), "onnxruntime-gpu"),
    "openvino": (("openvino",), "-e '.[embedded]'"),
    "tensorrt": (MODULES["tensorrt"], "-e '.[gpu]'"),
    "tensorrt-rtx": (MODULES["tensorrt-rtx"], "-e '.[rtx]'"),
}
"""What each runtime is imported as, one of several, and what `pip install` takes to have it."""


def missing(name: str) -> str | None:
    """Why the runner `name` cannot be had in this environment, or None."""
    runtime = name.partition(":")[0]
    packages, install = _PACKAGES[runtime]
    if all(map(_absent, packages)):
        return f"the package {packages[0]} is not installed; pip install {install}"
    if runtime in ("onnxruntime", "openvino"):
        return None
    if runtime in LIBRARIES and _absent("cuda.bindings"):
        return "the package cuda.bindings is not installed; pip install cuda-bindings"
    if gpu() is None:
        return "this machine has no NVIDIA GPU, or no driver for it"
    if runtime in PROVIDERS:
        import onnxruntime

        if PROVIDERS[runtime] not in onnxruntime.get_available_providers():
            return f"this ONNX Runtime has no {PROVIDERS[runtime]}; pip install {install}"
    return None


def _absent(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # of a parent package
        return True


def open_runner(bundle: Bundle, tower: Tower, name: str, graph: Graph = "onnx") -> Runner:
    """The runner called `name`, `<runtime>:<precision>`, of one tower of `bundle`; not yet entered.

    Of the tree graph it takes batches of trees; `text_tree.open_text_tree` makes them.

    Raises:
        RunnerError: there is no such runner, or not in this environment, or not of this graph.
        BundleError: the bundle has no such precision, or its file is not the exported one.
    """
    graph_of(name)
    if reason := missing(name):
        raise RunnerError(f"{name}: {reason}")
    runtime, _, precision = name.partition(":")
    if graph == "tree" and runtime not in TREE_RUNTIMES:
        raise RunnerError(f"{name} runs no trees; expected one of {', '.join(TREE_RUNTIMES)}")
    if runtime == "openvino":
        from serving.runners.open_vino import OpenVinoRunner

        return OpenVinoRunner(bundle, tower, precision, graph=graph)
    if library := library_of(name):
        from serving.runners.tensor_rt import TensorRtRunner

        return TensorRtRunner(bundle, tower, library, precision)
    from serving.runners.onnx_runtime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle, tower, precision, runtime, graph=graph)
