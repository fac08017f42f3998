"""Opens runners by name, and reports why one is not available in this environment.

The runtimes are imported only when one of their runners is opened.
"""

from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Graph
from serving.errors import RunnerError
from serving.runners.base import Runner
from serving.runners.spec import RunnerSpec, known, runtime_of
from serving.util.extras import is_installed
from serving.util.nvidia import gpu


def missing(runner: RunnerSpec | str) -> RunnerError | None:
    """Return why a runner is not available in this environment, and what to do; None if it is."""
    spec = known(runner)
    runtime = runtime_of(spec)
    if not any(map(is_installed, runtime.modules)):
        reason = f"the package {runtime.modules[0]} is not installed"
        return RunnerError(reason, advice=runtime.install)
    if runtime.device == "cpu":
        return None
    if runtime.library is not None and not is_installed("cuda.bindings"):
        reason = "the package cuda.bindings is not installed"
        return RunnerError(reason, advice="pip install cuda-bindings")
    if gpu() is None:
        return RunnerError("this machine has no NVIDIA GPU, or no driver for it")
    if runtime.provider is not None:
        import onnxruntime

        if runtime.provider not in onnxruntime.get_available_providers():
            reason = f"this ONNX Runtime has no {runtime.provider}"
            return RunnerError(reason, advice=runtime.install)
    return None


def open_runner(bundle: Bundle, graph: Graph, runner: RunnerSpec | str) -> Runner:
    """Return a runner of one graph of `bundle`, not yet entered.

    Of the prefix-tree graph it takes batches of trees; `open_prefix_tree` makes them of texts.

    Raises:
        RunnerError: there is no such runner, or not in this environment, or not of this graph.
        BundleError: the bundle has no such precision, or its file is not the exported one.
    """
    spec = known(runner)
    runtime = runtime_of(spec)
    if (error := missing(spec)) is not None:
        raise RunnerError(f"{spec}: {error.reason}", advice=error.advice)
    if graph == "prefix_tree" and not runtime.prefix_trees:
        raise RunnerError(f"{spec} does not run prefix trees")
    if spec.runtime == "openvino":
        from serving.runners.open_vino import OpenVinoRunner

        return OpenVinoRunner(bundle, graph, spec)
    if runtime.library is not None:
        from serving.runners.tensor_rt import TensorRtRunner

        assert graph != "prefix_tree"  # checked above: these runtimes run no trees
        return TensorRtRunner(bundle, graph, spec)
    from serving.runners.onnx_runtime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle, graph, spec)
