"""All errors that this project raises deliberately.

    ClipDeployError
    ├── InputError             an input that cannot be used
    │   ├── ImageError           an image
    │   ├── TextError            a text, label or prompt template
    │   │   └── TextTooLongError   a text with more tokens than the model takes
    │   └── CheckpointError      a checkpoint: name, directory, weights
    ├── ExportError            a graph that cannot be quantized, parsed or built
    ├── BundleError            a bundle that is missing, incomplete, or failed the parity gate
    ├── MissingPackageError    an optional dependency that is not installed
    ├── RunnerError            a runner that is not available, or does not run a batch
    ├── StorageError           a disk that is full
    └── ServerError            a Triton server that cannot be started or reached, or that failed
        ├── DeadlineError        the server did not respond in time
        └── UnavailableError     the server cannot be reached; a later attempt may succeed
            └── OverloadedError    its queues are full

Errors carry their parts as fields, which only `str` formats. Code that handles an error reads its
fields and never parses its text. `serving.util.wire` transports errors through Triton.
"""

import copy
from typing import Self


class ClipDeployError(Exception):
    """Base class of all errors. Commands print it without a traceback and exit with status 2.

    Args:
        reason: what was expected and what arrived.
        advice: what the user can do about it.
    """

    def __init__(self, reason: str = "", *, advice: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice

    def advised(self, advice: str) -> Self:
        """Return a copy of this error whose advice is `advice`."""
        other = copy.copy(self)
        other.advice = advice
        return other

    def __str__(self) -> str:
        return worded(self.reason, self.advice)


class InputError(ClipDeployError, ValueError):
    """An input that cannot be used.

    Args:
        reason: what was expected and what arrived.
        kind: the argument that the item belongs to, such as `images`, `texts` or `labels`.
        index: index of the item in that argument.
        name: name of the item, such as a path.
        advice: what the user can do about it.
    """

    def __init__(
        self,
        reason: str = "",
        *,
        kind: str | None = None,
        index: int | None = None,
        name: str | None = None,
        advice: str = "",
    ) -> None:
        super().__init__(reason, advice=advice)
        self.kind, self.index, self.name = kind, index, name

    def at(self, kind: str, index: int, name: str | None = None) -> Self:
        """Return a copy located at item `index` of the argument `kind`.

        If the error already has an index, `index` is added to it. If it has a name, that is kept.
        """
        other = copy.copy(self)
        other.kind, other.index = kind, index + (self.index or 0)
        other.name = self.name or name
        return other

    def shifted(self, count: int) -> Self:
        """Return a copy with `count` added to its index, for an item of a later batch."""
        other = copy.copy(self)
        if other.index is not None:
            other.index += count
        return other

    def within(self, name: str) -> Self:
        """Return a copy with the name `name`, such as the group that the item belongs to."""
        other = copy.copy(self)
        other.name = name
        return other

    def __str__(self) -> str:
        place = "" if self.kind is None or self.index is None else f"{self.kind}[{self.index}]"
        if self.name:
            place = f"{place} ({self.name})" if place else self.name
        reason = f"{place}: {self.reason}" if place else self.reason
        return worded(reason, self.advice)


class ImageError(InputError):
    """An image that cannot be decoded or exceeds a limit."""


class TextError(InputError):
    """A text, label or prompt template that cannot be used."""


class TextTooLongError(TextError):
    """A text with more tokens than the model takes."""


class CheckpointError(InputError):
    """A checkpoint that is unknown, incomplete, or not a CLIP model."""


class ExportError(ClipDeployError):
    """A graph that cannot be quantized, or that a compiler cannot parse or build."""


class BundleError(ClipDeployError):
    """A bundle that is missing, incomplete, tampered with, or failed the parity gate."""


class MissingPackageError(ClipDeployError, ImportError):
    """An optional dependency that is not installed; the message names the extra to install."""


class RunnerError(ClipDeployError):
    """A runner that is unknown, not available on this machine, or cannot run a batch.

    Args:
        reason: what was expected and what arrived.
        runner: name of the runner, unless the reason has it.
        advice: what to do about it.
    """

    def __init__(self, reason: str = "", *, runner: str | None = None, advice: str = "") -> None:
        super().__init__(reason, advice=advice)
        self.runner = runner

    def __str__(self) -> str:
        return worded(f"{self.runner}: {self.reason}" if self.runner else self.reason, self.advice)


class StorageError(ClipDeployError):
    """A disk that is full."""


class ServerError(ClipDeployError):
    """A Triton server that cannot be started or reached, or that failed."""


class DeadlineError(ServerError):
    """A Triton server that did not respond in time."""


class UnavailableError(ServerError):
    """A Triton server that cannot be reached at the moment; a later attempt may succeed."""


class OverloadedError(UnavailableError):
    """A Triton server that rejected a request because its queues are full."""


def worded(reason: str, advice: str) -> str:
    """Return the text of an error.

    Every message passes through this function. A test changes it to show that no code parses the
    result.
    """
    return f"{reason}; {advice}" if advice else reason


def excerpt(text: str, length: int = 40) -> str:
    """Return the beginning of a text for an error message; gRPC limits messages to 8 kB."""
    return repr(text) if len(text) <= length else f"{text[:length]!r}..."
