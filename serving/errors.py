"""Every error this project raises on purpose.

    ClipDeployError
    ├── InputError            what a user gave cannot be used; the message says what would be
    │   ├── ImageError          a picture
    │   ├── TextError           a text
    │   └── CheckpointError     a checkpoint: name, directory, weights
    ├── ExportError           a graph that a compiler cannot parse or build
    ├── BundleError           a bundle that is missing, incomplete, tampered with, or refused
    ├── MissingPackageError   an optional dependency that is not installed
    ├── RunnerError           a runner cannot give the device or precision it was asked for
    ├── StorageError          a disk that is full
    └── ServerError           a Triton server that cannot be started or reached, or that refused
        └── UnavailableError    nobody answers there, or not now; asking later may help
            └── OverloadedError   its queues are full

A message says what was expected, what arrived, and what to do.
"""

import re
from collections.abc import Sequence


class ClipDeployError(Exception):
    """Base of all errors of this project; commands print it without a traceback and exit with 2."""


class InputError(ClipDeployError, ValueError):
    """What a user gave cannot be used."""


class ImageError(InputError):
    """A picture that cannot be decoded, or is not allowed to be."""


class TextError(InputError):
    """A text that cannot be tokenized."""


class CheckpointError(InputError):
    """A checkpoint that is unknown, incomplete, or not a CLIP."""


class ExportError(ClipDeployError):
    """A graph that a compiler cannot parse or build."""


class BundleError(ClipDeployError):
    """A bundle that is missing, incomplete, tampered with, or refused by the gate."""


class MissingPackageError(ClipDeployError, ImportError):
    """An optional dependency that is not installed; the message names the extra that brings it."""


class RunnerError(ClipDeployError):
    """A runner that cannot give what it was asked for."""


class StorageError(ClipDeployError):
    """A disk that is full."""


class ServerError(ClipDeployError):
    """A Triton server that cannot be started or reached, or that refused a request."""


class UnavailableError(ServerError):
    """A Triton server that is not there, or not now; asking later may help."""


class OverloadedError(UnavailableError):
    """A Triton server that refused a request because its queues are full."""


def relocated(message: str, kind: str, start: int, names: Sequence[str]) -> str:
    """An item's error, with its place among all items instead of the place in its batch.

    Args:
        message: names its item `images[2]` or `texts[2]` first, or, alone in a batch, not at all.
        kind: `images` or `texts`.
        start: place of the batch's first item among all.
        names: of all items, such as paths; "" where there is none to tell.
    """
    found = re.match(rf"{kind}\[(\d+)\]:? ?", message)
    if found is None and len(names) == 1:
        return f"{names[0]}: {message}" if names[0] and names[0] not in message else message
    index = start + (int(found[1]) if found else 0)
    rest = message[found.end() :] if found else message
    name = names[index] if names[index] not in rest else ""
    return f"{kind}[{index}]{f' ({name})' if name else ''}: {rest}"
