"""Every use of TensorRT in our source, checked against the real bindings of TensorRT 10 and 11.

The bindings load without TensorRT over a stub of nine symbols, each in its own process
(`tests.support.tensorrt_uses`).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import CHECKOUT
from tests.support.tensorrt_uses import check, read

SOURCES = {
    path: (CHECKOUT / path).read_text(encoding="utf-8")
    for path in ("serving/runners/tensor_rt.py", "export/engines/builder.py")
}
BINDINGS = Path(sys.prefix) / "tensorrt-bindings"
"""Contains one directory `<version>/` for each version. `make setup` creates them."""
VERSIONS = ("10.16.1.11", "11.4.0.106", "rtx")
STUB = """
void *createInferBuilder_INTERNAL(void) {return 0;}
void *createInferRefitter_INTERNAL(void) {return 0;}
void *createInferRuntime_INTERNAL(void) {return 0;}
void *createNvOnnxParserRefitter_INTERNAL(void) {return 0;}
void *createNvOnnxParser_INTERNAL(void) {return 0;}
void *getBuilderPluginRegistry(void) {return 0;}
int getNvOnnxParserVersion(void) {return 0;}
void *getPluginRegistry(void) {return 0;}
int initLibNvInferPlugins(void) {return 1;}
"""
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")

MUTANTS = {
    "a flag": ("BuilderFlag.TF32", "BuilderFlag.FP16"),
    "a property": ("  config.set_flag(", "  config.int8_calibrator = 1; config.set_flag("),
    "an older property": (
        "  config.set_flag(",
        "  config.max_workspace_size = 1; config.set_flag(",
    ),
    "a read-only property": ("  _configure(", "  network.num_outputs = 1; _configure("),
    "a method": ("execute_async_v3", "execute_async_v2"),
    "a method through self": ("  self._shapes: ", "  self._engine.max_batch_size; self._shapes: "),
    "a class": ("library.OnnxParserRefitter", "library.OnnxRefitter"),
    "a keyword": ("ignore_mismatch=", "ignore_mismatches="),
    "no argument": ("create_timing_cache(content)", "create_timing_cache()"),
    "many arguments": ("set_input_shape(self._input, ", "set_input_shape(self._input, 1, "),
    "another enumeration": ("library.BuilderFlag.STRIP_PLAN", "library.ProfilingVerbosity.NONE"),
    "another value": ("library.ProfilingVerbosity.DETAILED", "library.TensorIOMode.INPUT"),
    "another object": ("OnnxParser(network, ", "OnnxParser(builder, "),
    "a wrong annotation": ("plan: trt.IHostMemory", "plan: trt.ITimingCache"),
    "an annotation with no class": ("builder: trt.Builder ", "builder: trt.TheBuilder "),
    "an override": ("parent: str | None, steps: int)", "parent: str | None)"),
    "no override": ("def step_complete", "def step_completed"),
    "a constructor": ("IProgressMonitor.__init__(self", "IProgressMonitor.__init__(self, 1"),
}
"""Mutations that must be reported: a fragment of our source, and its replacement."""
FINE_IN_10 = {"a flag", "a property"}

_ERROR = "error: trt.ParserError = parser.get_error(index)"
_CONFIG = "config: trt.IBuilderConfig = builder.create_builder_config()"
UNCLEAR_ONES = {
    "no annotation": ("network: trt.INetworkDefinition = ", "network = "),
    "an annotation without a type": ("refitter: trt.Refitter = ", "refitter: Any = "),
    "a chain": (_CONFIG, "config = builder.create_builder_config().clear()"),
    "a field": ("context: trt.IExecutionContext\n", "context: Any\n"),
    "a parameter": ("parser: trt.OnnxParser)", "parser: Any)"),
    "an element": (_ERROR, "error = [parser.get_error(index)][0]"),
    "a loop": (_ERROR, "for error in [parser.get_error(index)]: pass"),
    "a comprehension": (_ERROR, f"{_ERROR}; [e.desc() for e in [parser.get_error(index)]]"),
    "a conditional": (_CONFIG, "config = builder.create_builder_config() if builder else None"),
    "what a function returns": (
        "library.Builder(logger)",
        "library.Builder(logger); logger.log(0)",
    ),
    "getattr": ("library.MemoryPoolType", 'getattr(library, "MemoryPoolType")'),
    "another class": ("trt.ICudaEngine = self._engine", "trt.IExecutionContext = self._engine"),
}

CUDA_MUTANTS = {
    "a function": ("cudart.cudaGraphLaunch(", "cudart.cudaGraphStart("),
    "a member": ("cudaMemcpyHostToDevice", "cudaMemcpyHostToGpu"),
    "no argument": ("cudaGraphInstantiate(graph, 0)", "cudaGraphInstantiate(graph)"),
    "through self": ("self._cudart.cudaGraphExecDestroy", "self._cudart.cudaGraphDestroyExec"),
}


def mutated(old: str, new: str) -> dict[str, str]:
    changed = {path: source.replace(old, new) for path, source in SOURCES.items()}
    assert changed != SOURCES, "our source has no such place any more"
    return changed


@pytest.fixture(scope="session")
def stubs(tmp_path_factory) -> Path:
    """A directory for each major version of TensorRT, with libraries that define the nine
    symbols."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler: apt-get install gcc")
    root = tmp_path_factory.mktemp("stubs")
    (root / "stub.c").write_text(STUB)
    for major in ("10", "11"):
        (root / major).mkdir()
        for library in (f"{name}.so.{major}" for name in LIBRARIES):
            options = ["-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", root / major / library]
            subprocess.run([compiler, *options, root / "stub.c"], check=True)
    return root


@pytest.fixture(scope="session", params=VERSIONS)
def answer(request, stubs) -> dict[str, Any]:
    """Problems that one version has with our source and with every mutant of it."""
    version, module, paths = request.param, "tensorrt_bindings", {}
    if version == "rtx":
        module = "tensorrt_rtx_bindings"
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: make setup")
    else:
        if not (BINDINGS / version).is_dir():
            pytest.skip(f"{BINDINGS / version} is not there: make setup")
        libraries = [stubs / version.partition(".")[0], os.environ.get("LD_LIBRARY_PATH", "")]
        paths["LD_LIBRARY_PATH"] = ":".join(map(str, libraries)).strip(":")
        paths["PYTHONPATH"] = str(BINDINGS / version)
    asked = {"ours": SOURCES} | {name: mutated(*change) for name, change in MUTANTS.items()}
    uses = {name: list(map(asdict, read(sources)[0])) for name, sources in asked.items()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tensorrt_uses", module],
        cwd=CHECKOUT,
        env=os.environ | paths,
        input=json.dumps(uses),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"asked": version}


def test_real_bindings_are_loaded(answer):
    if answer["asked"] != "rtx":
        assert answer["version"] == answer["asked"]
    assert answer["types"] == [f"<class 'numpy.{t}'>" for t in ("uint8", "int32", "float32")]


def test_source_matches_the_bindings(answer):
    assert answer["problems"]["ours"] == []


@pytest.mark.parametrize("name", MUTANTS)
def test_mismatched_uses_are_reported(answer, name):
    problems = answer["problems"][name]
    if name in FINE_IN_10 and answer["version"].startswith("10."):
        assert problems == []
    else:
        assert problems


def test_no_other_module_uses_the_library():
    others = {
        path.relative_to(CHECKOUT).as_posix()
        for package in ("serving", "export", "training", "benchmarks", "model_repository")
        for path in (CHECKOUT / package).rglob("*.py")
        if re.search(r"\b(load_library|deserialize|cuda\.bindings import)\b", path.read_text())
    }
    assert others == set(SOURCES)


def test_every_use_is_read():
    """Spot checks of each way in which an object is passed on."""
    uses, cuda, problems = read(SOURCES)
    assert problems == []
    found = {(use.how, use.owner, use.name) for use in uses}
    assert found >= {
        ("get", "", "__version__"),
        ("call", "", "Builder"),  # a function of the module
        ("get", "", "BuilderFlag.TF32"),
        ("int", "", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"),
        ("call", "IBuilderConfig", "set_flag"),  # a method of a parameter
        ("call", "OnnxParser", "parse_from_file"),  # a method of a variable
        ("set", "IBuilderConfig", "progress_monitor"),
        ("call", "ParserError", "desc"),
        ("override", "IProgressMonitor", "step_complete"),
        ("compare", "", "ILogger.ERROR"),
        ("get", "", "TensorIOMode.INPUT"),
        ("get", "", "ExecutionContextAllocationStrategy.USER_MANAGED"),  # a method of self._trt
        ("call", "IExecutionContext", "execute_async_v3"),  # a method of an alias of a field
    }
    assert {"cudaMalloc", "cudaMemcpyKind.cudaMemcpyHostToDevice"} <= {use.name for use in cuda}
    text = "".join(SOURCES.values())
    assert len([use for use in cuda if use.how == "get"]) == len(
        re.findall(r"cudart\.cuda\w", text)
    ) + len(re.findall(r"cudart\.cuda\w+\.\w", text))


@pytest.mark.parametrize("name", UNCLEAR_ONES)
def test_uses_without_inferable_type_are_reported(name):
    _, _, problems = read(mutated(*UNCLEAR_ONES[name]))
    assert problems


def test_cuda_uses_match_the_bindings():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="no cuda-bindings: make setup")
    assert check(runtime, read(SOURCES)[1]) == []


@pytest.mark.parametrize("name", CUDA_MUTANTS)
def test_unknown_cuda_uses_are_reported(name):
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="no cuda-bindings: make setup")
    assert check(runtime, read(mutated(*CUDA_MUTANTS[name]))[1])
