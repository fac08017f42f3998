"""Transport of errors through Triton, which transmits only a status code and a string.

The string consists of the readable message and a last line with the error's fields:

    images[2]: the image is truncated
    #clip {"type": "ImageError", "reason": "the image is truncated", "kind": "images", "index": 2}

The Python models of this project write such strings. The client reads them, and so does the model
`clip_zero_shot`, which calls the other models. A message without that line, such as Triton's own
messages, becomes an error without fields.
"""

import re
from typing import Any, Literal

from serving.errors import (
    ClipDeployError,
    DeadlineError,
    ImageError,
    InputError,
    OverloadedError,
    ServerError,
    TextError,
    TextTooLongError,
    UnavailableError,
)
from serving.util.typed_json import json_text, parse_json

_MARK = "\n#clip "
_TYPES: dict[str, type[ClipDeployError]] = {
    kind.__name__: kind
    for kind in (
        *(InputError, ImageError, TextError, TextTooLongError),
        *(ServerError, DeadlineError, UnavailableError, OverloadedError),
    )
}
"""Errors that a server reports to its clients."""
_FIELDS = ("advice", "kind", "index", "name")

Fault = Literal["late", "full", "unknown model", "unavailable", "restricted", "other"]

_ENSEMBLE = re.compile(r"^in ensemble '\w+', ")
# Triton's own messages (2.51, recorded in tests/unit/serving/util/test_wire.py). Its status code
# does not distinguish a request that waited too long from a full queue.
_FAULTS: tuple[tuple[re.Pattern[str], Fault], ...] = (
    (re.compile(r"timeout expired|Deadline Exceeded", re.IGNORECASE), "late"),
    (re.compile(r"maximum queue size"), "full"),
    (re.compile(r"unknown model: '\w+'"), "unknown model"),
    (
        re.compile(r"Server (is stopping|not ready)|Stub process '\w+' is not healthy"),
        "unavailable",
    ),
    (re.compile(r"(API|protocol) is restricted"), "restricted"),
)


def to_text(error: ClipDeployError) -> str:
    """Return the Triton error message that transmits `error`."""
    fields = {name: getattr(error, name, None) for name in _FIELDS}
    document = {"type": type(error).__name__, "reason": error.reason}
    document |= {name: value for name, value in fields.items() if value not in ("", None)}
    return f"{error}{_MARK}{json_text(document)}"


def from_text(message: str) -> ClipDeployError | None:
    """Return the error that `to_text` encoded; None if `message` was not written by it."""
    sentence, mark, line = message.rpartition(_MARK)
    if not mark:
        return None
    try:
        document: Any = parse_json(line)
        kind = _TYPES[document.pop("type")]
        return kind(document.pop("reason", sentence), **document)
    except (ValueError, KeyError, TypeError, AttributeError):  # another version, or truncated
        return None


def own_words(message: str) -> str:
    """Return a Triton message without the prefix that names the ensemble."""
    return _ENSEMBLE.sub("", message)


def triton_fault(message: str) -> Fault:
    """Classify a message of Triton itself."""
    return next((fault for pattern, fault in _FAULTS if pattern.search(message)), "other")
