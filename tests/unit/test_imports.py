"""Who may import whom: `benchmarks, training -> export -> serving -> nothing of ours`."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

OURS = {"export", "serving", "training", "benchmarks", "tests"}
MAY_IMPORT = {
    "serving": {"serving"},
    "model_repository": {"serving"},
    "export": {"export", "serving"},
    "training": {"training", "export", "serving"},
    "benchmarks": {"benchmarks", "export", "serving"},
}
WITH_TORCH = {"export", "training", "benchmarks"}
WITH_TRANSFORMERS = "benchmarks/latency/peers.py"
WITH_TENSORRT = {"export/engines/builder.py", "serving/runners/tensor_rt.py"}
MODULES = [
    path.relative_to(CHECKOUT)
    for package in MAY_IMPORT
    for path in sorted((CHECKOUT / package).rglob("*.py"))
]


def imported(path: Path) -> set[str]:
    """Full names of everything a module imports, anywhere in it; relative names made whole."""
    names = set()
    for node in ast.walk(ast.parse((CHECKOUT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = ".".join(path.parts[: -node.level]) if node.level else ""
            names.add(f"{stem}.{node.module or ''}".strip("."))
    return names


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_the_modules_are_found():
    packages = {path.parts[0] for path in MODULES}
    assert {"serving", "export", "model_repository"} <= packages
    assert "torch" in tops(Path("export/towers/clip.py"))
    assert "serving" in tops(Path("model_repository/image_preprocess/1/model.py"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports(path):
    package = path.parts[0]
    assert tops(path) & OURS <= MAY_IMPORT[package]
    if package not in WITH_TORCH:
        assert not tops(path) & {"torch", "torchvision", "transformers", "safetensors"}
    if path.as_posix() not in WITH_TENSORRT:
        assert not any(name.startswith("tensorrt") for name in tops(path))
    if path.as_posix() != WITH_TRANSFORMERS:  # a reference for tests, a peer in benchmarks
        assert "transformers" not in tops(path)


def test_tensorrt_is_imported_only_when_it_is_needed():
    for path in MODULES:
        for node in ast.parse((CHECKOUT / path).read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("tensorrt") for name in names), path


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_is_named_after_another(path):
    taken = sys.stdlib_module_names | {
        *("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tokenizers", "numpy", "PIL"),
        *("typer", "rich", "ftfy", "tritonclient", "safetensors", "transformers", "matplotlib"),
    }
    assert path.stem not in taken - {"__main__", "__init__"}


def loaded_after(modules: list[str]) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter that imported `modules`."""
    # A list: a library's thread may import meanwhile.
    told = "print(*{n.partition('.')[0] for n in list(sys.modules)})"
    code = f"import sys, {', '.join(modules)}\n{told}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_serving_never_loads_torch():
    """Also not by way of a library."""
    left_out = {"serving.triton_models.tower"}  # needs the module that Triton's stub brings
    if find_spec("openvino") is None:
        left_out.add("serving.runners.open_vino")
    modules = [
        ".".join(path.with_suffix("").parts)
        for path in MODULES
        if path.parts[0] == "serving" and path.stem != "__init__"
    ]
    loaded = loaded_after([name for name in modules if name not in left_out])
    assert "serving" in loaded
    assert not loaded & {"torch", "export", "training", "benchmarks", "transformers", "onnx"}


def test_a_client_loads_no_runtime():
    """It installs numpy, pillow, tokenizers, ftfy, tritonclient, typer and rich, nothing else."""
    loaded = loaded_after(["serving.clients.triton", "serving.__main__", "serving.tasks.zero_shot"])
    assert "tritonclient" in loaded
    assert not loaded & {"torch", "onnxruntime", "openvino", "tensorrt", "pytriton", "onnx"}


def test_help_of_export_loads_no_torch():
    """`python -m export --help` and tab completion answer at once."""
    assert "torch" not in loaded_after(["export.kinds"])


def test_engines_are_built_without_torch():
    """In the container that serves them there is neither torch nor onnx."""
    loaded = loaded_after(["export.engines.bundle_engines", "export.__main__"])
    assert "export" in loaded
    assert not loaded & {"torch", "onnx", "onnxscript", "huggingface_hub", "tensorrt"}
