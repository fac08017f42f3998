"""Imports that the contracts of import-linter, which `make check` runs, do not cover."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

MODULES = [
    path.relative_to(CHECKOUT)
    for package in ("serving", "export", "training", "benchmarks", "model_repository")
    for path in sorted((CHECKOUT / package).rglob("*.py"))
]
WITH_TENSORRT = {"export/engines/builder.py", "serving/runners/tensor_rt.py"}
WITH_TRANSFORMERS = {"benchmarks/latency/peers.py"}  # a peer in benchmarks, a reference in tests
IN_TRITON_ONLY = {  # they import a module that only Triton's Python backend provides
    f"serving.triton_models.{name}"
    for name in (
        *("image_preprocess", "text_tokenize", "tower", "zero_shot"),
        *("counters", "requests", "responses"),
    )
}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((CHECKOUT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names.add((node.module or "").partition(".")[0])
    return names


def test_imports_of_modules_are_found():
    assert "torch" in imported(Path("export/towers/clip.py"))
    assert "serving" in imported(Path("model_repository/image_preprocess/1/model.py"))


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] == "model_repository"], ids=str)
def test_model_repository_imports_only_serving(path):
    assert imported(path) == {"serving"}


def test_tensorrt_and_transformers_are_imported_only_in_listed_modules():
    for path in MODULES:
        found = imported(path)
        if path.as_posix() not in WITH_TENSORRT:
            assert not any(name.startswith("tensorrt") for name in found), path
        if path.as_posix() not in WITH_TRANSFORMERS:
            assert "transformers" not in found, path


def test_tensorrt_is_not_imported_at_module_level():
    for path in MODULES:
        for node in ast.parse((CHECKOUT / path).read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("tensorrt") for name in names), path


def test_no_module_shadows_a_library():
    taken = sys.stdlib_module_names | {
        *("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tokenizers", "numpy", "PIL"),
        *("typer", "rich", "ftfy", "tritonclient", "safetensors", "transformers", "matplotlib"),
    }
    assert not [path for path in MODULES if path.stem in taken - {"__main__", "__init__"}]


def loaded_after(modules: list[str]) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter that imported `modules`."""
    # Copied to a list, because a library's thread may import meanwhile.
    told = "print(*{n.partition('.')[0] for n in list(sys.modules)})"
    code = f"import sys, {', '.join(modules)}\n{told}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_serving_never_loads_torch():
    """The check includes imports by libraries."""
    left_out = set(IN_TRITON_ONLY)
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
    """A client installs the project's dependencies without any extra."""
    loaded = loaded_after(
        ["serving.clients.triton", "export.cli.clip_deploy", "serving.tasks.zero_shot"]
    )
    assert "tritonclient" in loaded
    assert not loaded & {"torch", "onnxruntime", "openvino", "tensorrt", "pytriton", "onnx"}


def test_help_of_export_loads_no_torch():
    """`clip-deploy --help` and tab completion must answer quickly."""
    assert "torch" not in loaded_after(["export.cli.clip_deploy"])


def test_engines_are_built_without_torch():
    """The container that serves engines has neither torch nor onnx."""
    loaded = loaded_after(["export.engines.bundle_engines", "export.__main__"])
    assert "export" in loaded
    assert not loaded & {"torch", "onnx", "onnxscript", "huggingface_hub", "tensorrt"}
