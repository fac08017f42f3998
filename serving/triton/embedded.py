"""The tritonserver inside the `nvidia-pytriton` wheel: find it, and lay it out so that it runs.

The wheel carries tritonserver 2.51, its Python backend and no other, a response cache, and one
"stub" (the program that runs model.py files) for each Python version. pytriton's own Python code is
not used, not even imported. `serving.triton.server` starts what is laid out here.
"""

import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from serving.errors import ServerError
from serving.util.extras import install_command

VERSION = (2, 51)  # of the tritonserver in nvidia-pytriton 0.7.0


@dataclass(frozen=True)
class Embedded:
    """Where the parts of an embedded Triton server lie."""

    root: Path  # pytriton/tritonserver in site-packages
    stub: Path
    libraries: tuple[Path, ...]  # directories for the dynamic loader

    @property
    def binary(self) -> Path:
        """The tritonserver program."""
        return self.root / "bin" / "tritonserver"

    def lay_out(self, scratch: Path) -> list[str]:
        """Make a backend directory in `scratch`, and return the flags that point to the parts.

        The Python backend looks for its stub beside its library, where the wheel has none, and the
        wheel may be read-only; so links to both go into a directory of ours. The package `serving`
        lies there too, since that directory is on the sys.path of every model.py, and PYTHONPATH
        is not: the stubs for Python 3.11 and later run isolated (sys.flags.isolated is 1 in them).
        """
        backends = scratch / "backends"
        python = backends / "python"
        python.mkdir(parents=True)
        for part in (self.root / "backends" / "python").iterdir():
            (python / part.name).symlink_to(part)
        (python / self.stub.name).symlink_to(self.stub)
        (python / "serving").symlink_to(Path(__file__).resolve().parents[1])
        return [f"--backend-directory={backends}", f"--cache-directory={self.root / 'caches'}"]

    def environment(self) -> dict[str, str]:
        """Return the environment for tritonserver: ours, with this Python and its libraries first.

        The stub embeds an interpreter that takes its prefix, and so its site-packages, from the
        first `python3` on PATH.
        """
        libraries = [*map(str, self.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        return os.environ | {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "PATH": os.pathsep.join(programs),
        }


def find_embedded() -> Embedded:
    """Return the embedded server of this environment.

    Raises ServerError, saying what to install, when the wheel is missing, NumPy is 2, the wheel
    knows no stub for this Python, or this Python has no shared library.
    """
    python = sys.version_info[:2]
    root = find_wheel()
    check_numpy(importlib.metadata.version("numpy"))
    stub = find_stub(root, python)
    bundled = root.parents[1] / "nvidia_pytriton.libs"
    libpython = find_libpython(python, [bundled, *libpython_directories()])
    return Embedded(root, stub, tuple(dict.fromkeys((libpython, bundled))))


def find_wheel() -> Path:
    """Return the directory `pytriton/tritonserver` of the installed wheel."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "the embedded Triton server comes with nvidia-pytriton, which is not installed",
            advice=f"{install_command('embedded')}, or connect to a server that runs elsewhere",
        )
    return Path(spec.origin).parent / "tritonserver"


def check_numpy(version: str) -> None:
    """Refuse NumPy 2, with which a BYTES input kills the Python backend of 2.51 (measured)."""
    if int(version.split(".")[0]) >= 2:
        raise ServerError(
            f"the embedded Triton server needs NumPy 1, found NumPy {version}, with which its "
            "Python backend dies of any text or image input",
            advice=install_command("embedded"),
        )


def find_stub(root: Path, python: tuple[int, int]) -> Path:
    """Return the stub for one Python version, given as (major, minor)."""
    stubs = root / "python_backend_stubs"
    stub = stubs / "{}.{}".format(*python) / "triton_python_backend_stub"
    if not stub.is_file():
        known = sorted((path.name for path in stubs.iterdir()), key=lambda v: int(v.split(".")[1]))
        raise ServerError(
            f"the embedded Triton server runs models with Python {', '.join(known)}; this is "
            f"Python {python[0]}.{python[1]}",
            advice="make the virtual environment with one of those",
        )
    return stub


def libpython_directories() -> list[Path]:
    """Return where the shared library of this interpreter may lie, likeliest first."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    libdir = sysconfig.get_config_var("LIBDIR") or "/usr/lib"
    usual = (libdir, f"{sys.base_prefix}/lib", f"/usr/lib/{multiarch}", "/usr/lib64", "/usr/lib")
    return [Path(directory) for directory in dict.fromkeys((*usual, "/usr/local/lib"))]


def find_libpython(python: tuple[int, int], directories: list[Path]) -> Path:
    """Return the first of `directories` that holds the shared libpython which the stub needs.

    The stub for 3.13 asks for it under another name, libpython3-<hash>.13.so.1.0, and the wheel
    carries that one; the others ask for the interpreter's own, which not every build has.
    """
    major, minor = python
    names = (f"libpython{major}.{minor}.so.1.0", f"libpython{major}-*.{minor}.so.1.0")
    for directory in directories:
        if any(any(directory.glob(name)) for name in names):
            return directory
    raise ServerError(
        f"the embedded Triton server needs {names[0]}, found in none of "
        f"{', '.join(map(str, directories))}",
        advice=f"install it (Debian, Ubuntu: apt-get install libpython{major}.{minor}), or use a "
        "Python built with --enable-shared",
    )
