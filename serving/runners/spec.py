"""The table of runners: each is a runtime and a precision, and runs one graph of a bundle."""

from dataclasses import dataclass
from typing import Literal, Self

from serving.bundles.engine_facts import MODULES, Library
from serving.bundles.manifest import Artifact
from serving.errors import RunnerError
from serving.util.extras import install_command

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """The name of a runner: a runtime and a precision, written as in `openvino:int8`."""

    runtime: str
    precision: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `<runtime>:<precision>`.

        Raises:
            RunnerError: `text` does not have that form.
        """
        runtime, colon, precision = text.partition(":")
        if not (runtime and colon and precision) or ":" in precision:
            raise RunnerError(
                f"{text!r} does not name a runner", advice="give one such as openvino:int8"
            )
        return cls(runtime, precision)

    def __str__(self) -> str:
        return f"{self.runtime}:{self.precision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A library that runs graphs or engines on one type of device."""

    device: Device
    graphs: dict[str, str]
    """Precision of a runner -> precision of the graph that it runs or builds its engine from."""
    modules: tuple[str, ...]
    """Names of its modules, any one of which suffices."""
    install: str
    """Shell command that installs it."""
    provider: str | None = None
    """ONNX Runtime's execution provider."""
    library: Library | None = None
    """The TensorRT library whose engines it runs; None if it runs ONNX graphs."""
    prefix_trees: bool = False
    """True if it runs the prefix-tree graph, whose output length depends on the input's values."""


_INT8 = {"int8": "int8", "int8-fp16": "int8-fp16"}
_ENGINES = {"tf32": "fp32", "fp16": "fp16", **_INT8}
_GPU_PACKAGE = "pip install onnxruntime-gpu"

RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(
        device="cpu",
        graphs={"fp32": "fp32", "fp16": "fp16", **_INT8, "int8-dynamic": "int8-dynamic"},
        modules=("onnxruntime",),
        install=install_command("cpu"),
        provider="CPUExecutionProvider",
        prefix_trees=True,
    ),
    "onnxruntime-cuda": Runtime(
        device="cuda",
        graphs={"fp32": "fp32", "fp16": "fp16", **_INT8},
        modules=("onnxruntime",),
        install=_GPU_PACKAGE,
        provider="CUDAExecutionProvider",
    ),
    "onnxruntime-tensorrt": Runtime(
        device="cuda",
        graphs={"fp16": "fp16", **_INT8},
        modules=("onnxruntime",),
        install=_GPU_PACKAGE,
        provider="TensorrtExecutionProvider",
    ),
    "openvino": Runtime(
        device="cpu",
        graphs={"fp32": "fp32", "bf16": "fp32", "fp16": "fp16", "int8": "int8"},
        modules=("openvino",),
        install=install_command("cpu"),
        prefix_trees=True,
    ),
    "tensorrt": Runtime(
        device="cuda",
        graphs=_ENGINES,
        modules=MODULES["tensorrt"],
        install=install_command("gpu"),
        library="tensorrt",
    ),
    "tensorrt-rtx": Runtime(
        device="cuda",
        graphs=_ENGINES,
        modules=MODULES["tensorrt-rtx"],
        install=install_command("rtx"),
        library="tensorrt-rtx",
    ),
}

RUNNERS: tuple[RunnerSpec, ...] = tuple(
    RunnerSpec(name, precision)
    for name, runtime in RUNTIMES.items()
    for precision in runtime.graphs
)
"""All runners of artifacts in a bundle."""


def known(runner: RunnerSpec | str) -> RunnerSpec:
    """Return the spec of a runner, after checking that it is in the table.

    Raises:
        RunnerError: the table has no such runner.
    """
    spec = RunnerSpec.parse(runner) if isinstance(runner, str) else runner
    if spec not in RUNNERS:
        raise RunnerError(
            f"unknown runner {str(spec)!r}; expected one of {', '.join(map(str, RUNNERS))}"
        )
    return spec


def runtime_of(spec: RunnerSpec) -> Runtime:
    """Return the runtime of a runner in the table."""
    return RUNTIMES[spec.runtime]


def device_of(spec: RunnerSpec) -> Device:
    """Return the device of any runner, including PyTorch's, such as `eager-cuda` on a GPU."""
    if spec.runtime in RUNTIMES:
        return RUNTIMES[spec.runtime].device
    return "cuda" if spec.runtime.endswith("-cuda") else "cpu"


def graph_of(spec: RunnerSpec) -> str:
    """Return the precision of the graph that a runner in the table runs."""
    return RUNTIMES[spec.runtime].graphs[spec.precision]


def runners_of(artifact: Artifact) -> list[RunnerSpec]:
    """Return the runners of `artifact`, whether or not they are available here."""
    if artifact.kind == "torchscript":
        return []
    library = artifact.engine.library if artifact.engine else None
    return [
        spec
        for spec in RUNNERS
        if graph_of(spec) == artifact.precision
        and runtime_of(spec).library == library
        and (artifact.graph != "prefix_tree" or runtime_of(spec).prefix_trees)
    ]
