"""Opens runners by name, and says why one cannot be had in this environment.

The runtimes are imported only when one of their runners is opened.
"""

from serving.bundles.bundle import Bundle
from serving.bundles.engine_facts import LIBRARIES, MODULES
from serving.bundles.manifest import Graph, Tower
from serving.errors import RunnerError
from serving.runners.base import Runner
from serving.runners.spec import PROVIDERS, TREE_RUNTIMES, graph_of, library_of
from serving.util.extras import install_command, is_installed
from serving.util.nvidia import gpu

_PACKAGES = {
    "onnxruntime": (("onnxruntime",), install_command("cpu")),
    "onnxruntime-cuda": (("onnxruntime",), "pip install onnxruntime-gpu"),
    "onnxruntime-tensorrt": (("onnxruntime",), "pip install onnxruntime-gpu"),
    "openvino": (("openvino",), install_command("cpu")),
    "tensorrt": (MODULES["tensorrt"], install_command("gpu")),
    "tensorrt-rtx": (MODULES["tensorrt-rtx"], install_command("rtx")),
}
"""Modules of each runtime, any of which will do, and the command that installs one."""


def missing(name: str) -> str | None:
    """Why the runner `name` cannot be had in this environment, or None."""
    runtime = name.partition(":")[0]
    packages, install = _PACKAGES[runtime]
    if not any(map(is_installed, packages)):
        return f"the package {packages[0]} is not installed; {install}"
    if runtime in ("onnxruntime", "openvino"):
        return None
    if runtime in LIBRARIES and not is_installed("cuda.bindings"):
        return "the package cuda.bindings is not installed; pip install cuda-bindings"
    if gpu() is None:
        return "this machine has no NVIDIA GPU, or no driver for it"
    if runtime in PROVIDERS:
        import onnxruntime

        if PROVIDERS[runtime] not in onnxruntime.get_available_providers():
            return f"this ONNX Runtime has no {PROVIDERS[runtime]}; {install}"
    return None


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
