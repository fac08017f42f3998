"""Open runners by name, and report why a runner is not available in this environment.

A runtime is imported only when one of its runners is opened.
"""

from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Graph
from serving.errors import RunnerError
from serving.runners.base import Runner
from serving.runners.spec import RunnerSpec, known, runtime_of
from serving.util.extras import is_installed
from serving.util.nvidia import gpu


def missing(runner: RunnerSpec | str) -> RunnerError | None:
    """Return the error that says why a runner is not available here; None if it is available."""
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

    The runner of the prefix-tree graph takes batches of trees; use `open_prefix_tree` for a runner
    that takes texts.

    Raises:
        RunnerError: the runner is unknown, not available here, or cannot run this graph.
        BundleError: the bundle has no graph or engine in this precision, or the file differs from
            the exported one.
    """
    spec = known(runner)
    runtime = runtime_of(spec)
    if (error := missing(spec)) is not None:
        raise RunnerError(error.reason, runner=str(spec), advice=error.advice)
    if graph == "prefix_tree" and not runtime.prefix_trees:
        raise RunnerError(f"{spec} does not run prefix trees")
    if spec.runtime == "openvino":
        from serving.runners.open_vino import OpenVinoRunner

        return OpenVinoRunner(bundle, graph, spec)
    if runtime.library is not None:
        from serving.runners.tensor_rt import TensorRtRunner

        assert graph != "prefix_tree"  # checked above: TensorRT does not run prefix trees
        return TensorRtRunner(bundle, graph, spec)
    from serving.runners.onnx_runtime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle, graph, spec)
