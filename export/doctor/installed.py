"""Which of the packages and programs that we can use are here, and whether they work.

Does not know: what each ability needs of them (`export.doctor.report`).
"""

import importlib
import importlib.metadata
import json
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

IMPORTS_TIMEOUT_S = 60
"""All packages together take about 3 s, and far longer when the disk is cold."""

PROGRAM_TIMEOUT_S = 5

EXPORT, CPU, EMBEDDED, GPU, RTX = (
    install_command(extra) for extra in ("export", "cpu", "embedded", "gpu", "rtx")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """A Python package or a program."""

    name: str
    purpose: str
    state: Literal["works", "missing", "broken"]
    """broken: it is installed and cannot be used."""
    version: str | None = None
    error: str | None = None
    """Of what is broken."""
    mend: str | None = None
    """What to do about it, unless it works."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What more it says of itself."""


class _Package(NamedTuple):
    purpose: str
    install: str
    modules: tuple[str, ...]
    """Any of which will do."""


# Imported from the last to the first: torch loads CUDA libraries, which others would then find
# here, and not in the processes that use them without torch.
_PACKAGES = {
    "torch": _Package("export", EXPORT, ("torch",)),
    "onnx": _Package("export", EXPORT, ("onnx",)),
    "onnxscript": _Package("export", EXPORT, ("onnxscript",)),
    "safetensors": _Package("export", EXPORT, ("safetensors",)),
    "huggingface-hub": _Package("export", EXPORT, ("huggingface_hub",)),
    "onnxruntime": _Package("export, serving", CPU, ("onnxruntime",)),
    "openvino": _Package("serving by the CPU", CPU, ("openvino",)),
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
    """To which it answers if it works."""


_CONTAINER = "serving in a container"
_DOCKER = "apt-get install docker.io && systemctl start docker"
_PROGRAMS = {
    "docker": _Program(_CONTAINER, _DOCKER, "version --format {{.Server.Version}}"),
    "podman": _Program(_CONTAINER, "apt-get install podman", "info --format {{.Version.Version}}"),
    "trtexec": _Program("timing engines", "in the container nvcr.io/nvidia/tensorrt", "--help"),
    "perf_analyzer": _Program(
        "load on a server",
        "in the container nvcr.io/nvidia/tritonserver:26.07-py3-sdk",
        "--version",
    ),
}

_IMPORT_ALL = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from export.doctor.installed import import_all
import_all(sys.argv[2:])"""


def packages() -> list[Software]:
    """Import each package in another process, since a native one can end the interpreter.

    One process imports them all; if it ends early, another goes on with the next package.
    """
    answers: dict[str, dict[str, Any]] = {}
    while names := [name for name in reversed(_PACKAGES) if name not in answers]:
        # It looks for packages where this process does.
        command = [sys.executable, "-c", _IMPORT_ALL, json.dumps(sys.path), *names]
        end, out, err = _run(command, IMPORTS_TIMEOUT_S)
        answers.update(json.loads(line) for line in out.splitlines())
        if culprit := next((name for name in names if name not in answers), None):
            said = _last_line(err)
            answers[culprit] = {
                "error": f"importing it ended Python ({end or 'exit code 0'}){said}"
            }
    return [_package(name, answers[name]) for name in _PACKAGES]


def import_all(names: list[str]) -> None:
    """Import packages, write a line of JSON on each, and end this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # packages print too
    for name in names:
        answers.write(json.dumps([name, _import(name)]) + "\n")
    os._exit(0)  # some crash while they are unloaded


def _import(name: str) -> dict[str, Any]:
    errors = []
    for module in _PACKAGES[name].modules:
        try:
            imported = importlib.import_module(module)
            facts = _FACTS.get(name, lambda _: {})(imported)
            return {"version": getattr(imported, "__version__", None), "facts": facts}
        except BaseException as error:  # whatever one of them does, the others have their turn
            absent = isinstance(error, ModuleNotFoundError) and error.name
            if not absent or not f"{module}.".startswith(f"{absent}."):
                errors.append(f"{type(error).__name__}: {error}")
    return {"error": " ".join("; ".join(errors).split())}  # empty: no such module


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
        error=answer["error"] or f"no module {modules[0]}, though it is installed",
        mend=f"pip uninstall --yes {' '.join(versions)}; {install}" if versions else install,
    )


def embedded() -> Software:
    """The Triton server in the wheel of nvidia-pytriton, with the libpython that it needs."""
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
    """Look for programs on PATH, and ask each whether it works."""
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
    """How a program ended, nothing if well, and what it wrote to standard output and error."""
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
