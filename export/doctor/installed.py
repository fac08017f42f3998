"""Checks of the Python packages and programs that this project can use: installed, and working.

`export.doctor.report` lists which of them each task needs.
"""

import importlib
import importlib.metadata
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from serving.bundles.engine_facts import MODULES
from serving.errors import ServerError
from serving.triton.embedded import find_embedded
from serving.util.extras import install_command
from serving.util.typed_json import json_text, parse_json

IMPORTS_TIMEOUT_S = 60
"""Time limit for importing all packages. It takes about 3 s, and much longer from a cold disk."""

PROGRAM_TIMEOUT_S = 5

EXPORT, CPU, EMBEDDED, GPU, RTX = (
    install_command(extra) for extra in ("export", "cpu", "embedded", "gpu", "rtx")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Python package or program, and its state on this machine."""

    name: str
    purpose: str
    state: Literal["works", "missing", "broken"]
    """`broken` means that it is installed but cannot be used."""
    version: str | None = None
    error: str | None = None
    """Error of a broken one."""
    mend: str | None = None
    """Command or advice that fixes it; None if it works."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further facts, such as the execution providers of ONNX Runtime."""


class _Package(NamedTuple):
    purpose: str
    install: str
    modules: tuple[str, ...]
    """Alternative module names; one of them is enough."""


# Packages are imported from the last to the first. torch has to come last: it loads CUDA libraries,
# with which other packages would work here but fail in a process without torch.
_PACKAGES = {
    "torch": _Package("export", EXPORT, ("torch",)),
    "onnx": _Package("export", EXPORT, ("onnx",)),
    "onnxscript": _Package("export", EXPORT, ("onnxscript",)),
    "safetensors": _Package("export", EXPORT, ("safetensors",)),
    "huggingface-hub": _Package("export", EXPORT, ("huggingface_hub",)),
    "onnxruntime": _Package("export, serving", CPU, ("onnxruntime",)),
    "openvino": _Package("serving on the CPU", CPU, ("openvino",)),
    "tensorrt": _Package("engines for one GPU", GPU, MODULES["tensorrt"]),
    "tensorrt-rtx": _Package("engines for many GPUs", RTX, MODULES["tensorrt-rtx"]),
    "cuda-bindings": _Package("running engines", GPU, ("cuda.bindings.runtime",)),
}
_FACTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "onnxruntime": lambda ort: {"providers": ort.get_available_providers()},
    "openvino": lambda ov: {"cpu": ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")},
    "torch": lambda torch: {"cuda": torch.version.cuda, "gpu": torch.cuda.is_available()},
}
_DISTRIBUTIONS = ("{}", "{}-gpu", "{}-cu13-bindings", "{}-cu12-bindings")


class _Program(NamedTuple):
    purpose: str
    install: str
    arguments: str
    """Arguments of a command that succeeds if the program works."""


_CONTAINER = "serving in a container"
_DOCKER = "apt-get install docker.io && systemctl start docker"
_PROGRAMS = {
    "docker": _Program(_CONTAINER, _DOCKER, "version --format {{.Server.Version}}"),
    "podman": _Program(_CONTAINER, "apt-get install podman", "info --format {{.Version.Version}}"),
    "trtexec": _Program("timing engines", "use the container nvcr.io/nvidia/tensorrt", "--help"),
    "perf_analyzer": _Program(
        "load tests of a server",
        "use the container nvcr.io/nvidia/tritonserver:26.07-py3-sdk",
        "--version",
    ),
}

_IMPORT_ALL = """import ast, sys
sys.path[:] = ast.literal_eval(sys.argv[1])
from export.doctor.installed import import_all
import_all(sys.argv[2:])"""


def packages() -> list[Software]:
    """Import each package in a child process, because a native library can crash the interpreter.

    One process imports all packages. If it crashes, another one continues with the next package.
    """
    answers: dict[str, dict[str, Any]] = {}
    while names := [name for name in reversed(_PACKAGES) if name not in answers]:
        # The child gets this process's sys.path, so that it finds the same packages.
        command = [sys.executable, "-c", _IMPORT_ALL, repr(sys.path), *names]
        end, out, err = _run(command, IMPORTS_TIMEOUT_S)
        answers.update(parse_json(line) for line in out.splitlines())
        if culprit := next((name for name in names if name not in answers), None):
            last = _last_line(err)
            answers[culprit] = {
                "error": f"importing it ended Python ({end or 'exit code 0'}){last}"
            }
    return [_package(name, answers[name]) for name in _PACKAGES]


def import_all(names: list[str]) -> None:
    """Import packages, write a line of JSON for each, and end this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # some packages print to standard output
    for name in names:
        answers.write(json_text([name, _import(name)]) + "\n")
    os._exit(0)  # some packages crash when they are unloaded


def _import(name: str) -> dict[str, Any]:
    errors = []
    for module in _PACKAGES[name].modules:
        try:
            imported = importlib.import_module(module)
            facts = _FACTS.get(name, lambda _: {})(imported)
            return {"version": getattr(imported, "__version__", None), "facts": facts}
        except BaseException as error:  # the other packages are still checked
            absent = isinstance(error, ModuleNotFoundError) and error.name
            if not absent or not f"{module}.".startswith(f"{absent}."):
                errors.append(f"{type(error).__name__}: {error}")
    return {"error": " ".join("; ".join(errors).split())}  # empty if there is no such module


def _package(name: str, answer: dict[str, Any]) -> Software:
    purpose, install, modules = _PACKAGES[name]
    versions = {}
    for distribution in (form.format(name) for form in _DISTRIBUTIONS):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[distribution] = importlib.metadata.version(distribution)
    version = next(iter(versions.values()), answer.get("version"))
    if "error" not in answer:
        facts = answer["facts"] | {"distributions": list(versions)}
        return Software(name=name, purpose=purpose, state="works", version=version, facts=facts)
    if not answer["error"] and not versions:
        return Software(name=name, purpose=purpose, state="missing", mend=install)
    return Software(
        name=name,
        purpose=purpose,
        state="broken",
        version=version,
        error=answer["error"] or f"the distribution is installed, but not its module {modules[0]}",
        mend=f"pip uninstall --yes {' '.join(versions)}; {install}" if versions else install,
    )


def embedded() -> Software:
    """Check the Triton server in the wheel of nvidia-pytriton, and the libpython that it needs."""
    name, purpose = "nvidia-pytriton", "serving on loopback"
    try:
        version = importlib.metadata.version(name)
        facts = {"libpython": str(find_embedded().libraries[0])}
    except importlib.metadata.PackageNotFoundError:
        return Software(name=name, purpose=purpose, state="missing", mend=EMBEDDED)
    except ServerError as error:
        return Software(
            name=name,
            purpose=purpose,
            state="broken",
            version=version,
            error=error.reason,
            mend=error.advice,
        )
    return Software(name=name, purpose=purpose, state="works", version=version, facts=facts)


def programs() -> list[Software]:
    """Find programs on PATH and check that each works."""
    return [_program(name, *program) for name, program in _PROGRAMS.items()]


def _program(name: str, purpose: str, install: str, arguments: str) -> Software:
    path = shutil.which(name)
    if path is None:
        return Software(name=name, purpose=purpose, state="missing", mend=install)
    end, out, err = _run([path, *arguments.split()], PROGRAM_TIMEOUT_S)
    version = re.search(r"\d+(\.\d+){2,}", out)
    return Software(
        name=name,
        purpose=purpose,
        state="broken" if end else "works",
        version=version[0] if version else None,
        error=f"{name} {arguments.split()[0]}: {end}{_last_line(err or out)}" if end else None,
        mend=install if end else None,
        facts={"path": path},
    )


def _run(command: list[str], timeout_s: int) -> tuple[str, str, str]:
    """Run a program.

    Returns:
        The reason of its failure, empty if it succeeded, its standard output and its standard
        error.
    """
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
    except OSError as error:
        return str(error), "", ""
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return f"no answer within {timeout_s} s", *child.communicate()
    code = child.returncode
    killed = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
    return killed if code else "", out, err


def _last_line(text: str) -> str:
    return "".join(f": {line}" for line in text.strip().splitlines()[-1:])
