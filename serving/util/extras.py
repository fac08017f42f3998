"""Optional dependencies: check that they are installed, and name the extra that installs them."""

import importlib.util

from serving.errors import MissingPackageError


def install_command(extra: str) -> str:
    """Return the shell command that installs `extra`.

    pip reads the requirements of an extra from the metadata of the installed project, so the
    command works with an installed wheel and in a checkout.
    """
    return f"pip install 'clip-deploy[{extra}]'"


def is_installed(module: str) -> bool:
    """Return whether `module` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed
        return False


def require(purpose: str, extra: str, *modules: str) -> None:
    """Check that optional dependencies are installed.

    Args:
        purpose: subject of the message, such as "bulk embedding".
        extra: the extra of the project that installs the modules.
        modules: names of the modules to import.

    Raises:
        MissingPackageError: a module is not installed.
    """
    if missing := [module for module in modules if not is_installed(module)]:
        raise MissingPackageError(
            f"{purpose} needs {' and '.join(missing)}, not installed here",
            advice=install_command(extra),
        )
