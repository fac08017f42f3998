"""Locates the tritonserver inside the `nvidia-pytriton` wheel and prepares it to run.

The wheel contains tritonserver 2.51, the Python backend (no other backend), a response cache, and
one "stub" (the program that runs model.py files) for each supported Python version. pytriton's own
Python code is not imported. `serving.triton.server` starts the server that this module prepares.
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

VERSION = (2, 51)  # release of the tritonserver in nvidia-pytriton 0.7.0


@dataclass(frozen=True)
class Embedded:
    """Paths of the parts of an embedded Triton server."""

    root: Path  # pytriton/tritonserver in site-packages
    stub: Path
    libraries: tuple[Path, ...]  # directories for LD_LIBRARY_PATH

    @property
    def binary(self) -> Path:
        """Path of the tritonserver executable."""
        return self.root / "bin" / "tritonserver"

    def lay_out(self, scratch: Path) -> list[str]:
        """Create a backend directory in `scratch`, and return tritonserver flags that point to it.

        The Python backend looks for its stub next to its library. The wheel stores the stub
        elsewhere and may be read-only, so both are linked into a new directory. The package
        `serving` is linked there as well, because that directory is on the sys.path of every
        model.py while PYTHONPATH is ignored: the stubs for Python 3.11 and later run in isolated
        mode (`sys.flags.isolated` is 1).
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
        """Return the environment variables for tritonserver.

        They are those of this process, with this interpreter first on PATH and the libraries first
        on LD_LIBRARY_PATH. The stub embeds an interpreter that derives its prefix, and so its
        site-packages, from the first `python3` on PATH.
        """
        libraries = [*map(str, self.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        return os.environ | {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "PATH": os.pathsep.join(programs),
        }


def find_embedded() -> Embedded:
    """Return the embedded server of this environment.

    Raises:
        ServerError: the wheel is missing, NumPy 2 is installed, the wheel has no stub for this
            Python version, or this Python has no shared library. The advice says what to install.
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
            "the embedded Triton server requires nvidia-pytriton, which is not installed",
            advice=f"{install_command('embedded')}, or connect to a server that runs elsewhere",
        )
    return Path(spec.origin).parent / "tritonserver"


def check_numpy(version: str) -> None:
    """Check that NumPy is older than 2, with which BYTES inputs crash the Python backend of 2.51.

    Raises:
        ServerError: `version` is 2 or later.
    """
    if int(version.split(".")[0]) >= 2:
        raise ServerError(
            f"the embedded Triton server requires NumPy 1, found NumPy {version}, with which its "
            "Python backend crashes on any text or image input",
            advice=install_command("embedded"),
        )


def find_stub(root: Path, python: tuple[int, int]) -> Path:
    """Return the stub for a Python version, given as (major, minor).

    Raises:
        ServerError: the wheel has no stub for it.
    """
    stubs = root / "python_backend_stubs"
    stub = stubs / "{}.{}".format(*python) / "triton_python_backend_stub"
    if not stub.is_file():
        known = sorted((path.name for path in stubs.iterdir()), key=lambda v: int(v.split(".")[1]))
        raise ServerError(
            f"the embedded Triton server supports Python {', '.join(known)}; this is "
            f"Python {python[0]}.{python[1]}",
            advice="create the virtual environment with a supported version",
        )
    return stub


def libpython_directories() -> list[Path]:
    """Return directories that may hold the shared library of this interpreter, likeliest first."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    libdir = sysconfig.get_config_var("LIBDIR") or "/usr/lib"
    usual = (libdir, f"{sys.base_prefix}/lib", f"/usr/lib/{multiarch}", "/usr/lib64", "/usr/lib")
    return [Path(directory) for directory in dict.fromkeys((*usual, "/usr/local/lib"))]


def find_libpython(python: tuple[int, int], directories: list[Path]) -> Path:
    """Return the first of `directories` that contains the shared libpython that the stub needs.

    The stub for 3.13 links against libpython3-<hash>.13.so.1.0, which the wheel contains. The other
    stubs link against the interpreter's own libpython, which not every Python build has.

    Raises:
        ServerError: none of `directories` contains it.
    """
    major, minor = python
    names = (f"libpython{major}.{minor}.so.1.0", f"libpython{major}-*.{minor}.so.1.0")
    for directory in directories:
        if any(any(directory.glob(name)) for name in names):
            return directory
    raise ServerError(
        f"the embedded Triton server requires {names[0]}, which was not found in "
        f"{', '.join(map(str, directories))}",
        advice=f"install it (Debian, Ubuntu: apt-get install libpython{major}.{minor}), or use a "
        "Python built with --enable-shared",
    )
