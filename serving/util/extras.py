"""Optional dependencies: which extra of the project brings them, and the error without them."""

import importlib.util

from serving.errors import MissingPackageError


def install_command(extra: str) -> str:
    """Return the shell command that installs `extra`.

    pip takes the requirements of an extra from the metadata of the installed project, so that the
    command works beside a wheel and in a checkout alike.
    """
    return f"pip install 'clip-deploy[{extra}]'"


def is_installed(module: str) -> bool:
    """Return whether `module` can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def require(purpose: str, extra: str, *modules: str) -> None:
    """Check that optional dependencies are installed.

    Args:
        purpose: subject of the message, such as "bulk embedding".
        extra: the extra of the project that brings the modules.
        modules: names as they are imported.

    Raises:
        MissingPackageError: at least one is not installed.
    """
    if missing := [module for module in modules if not is_installed(module)]:
        raise MissingPackageError(
            f"{purpose} needs {' and '.join(missing)}, not installed here: {install_command(extra)}"
        )
