"""CLIP served by Triton, with clients for Python and the command line.

The names below are the public interface. They are imported on first use, so that `import serving`
is fast and needs no optional dependency. `import serving` turns off the telemetry of libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

from serving.errors import (
    BundleError,
    CheckpointError,
    ClipDeployError,
    DeadlineError,
    ExportError,
    ImageError,
    InputError,
    MissingPackageError,
    OverloadedError,
    RunnerError,
    ServerError,
    StorageError,
    TextError,
    TextTooLongError,
    UnavailableError,
)
from serving.util.telemetry import turn_off

if TYPE_CHECKING:
    from serving.clients.endpoint import Credentials
    from serving.clients.local import LocalClip
    from serving.clients.triton import ClipClient
    from serving.tasks.zero_shot import ZeroShotClassifier

__all__ = [
    "BundleError",
    "CheckpointError",
    "ClipClient",
    "ClipDeployError",
    "Credentials",
    "DeadlineError",
    "ExportError",
    "ImageError",
    "InputError",
    "LocalClip",
    "MissingPackageError",
    "OverloadedError",
    "RunnerError",
    "ServerError",
    "StorageError",
    "TextError",
    "TextTooLongError",
    "UnavailableError",
    "ZeroShotClassifier",
]

turn_off()

_MODULES = {
    "ClipClient": "serving.clients.triton",
    "Credentials": "serving.clients.endpoint",
    "LocalClip": "serving.clients.local",
    "ZeroShotClassifier": "serving.tasks.zero_shot",
}


def __getattr__(name: str) -> Any:
    """Import a name of the public interface on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
