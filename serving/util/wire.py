"""Errors on their way through Triton, which carries a status code and a string.

The string is the sentence for people, then a last line with the fields:

    images[2]: the image is truncated
    #clip {"type": "ImageError", "reason": "the image is truncated", "kind": "images", "index": 2}

Our Python models write it, the client and `clip_zero_shot`, which calls the other models, read it.
A message without that line, such as one of Triton's own, becomes an error without fields.
"""

import json
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

_MARK = "\n#clip "
_TYPES: dict[str, type[ClipDeployError]] = {
    kind.__name__: kind
    for kind in (
        *(InputError, ImageError, TextError, TextTooLongError),
        *(ServerError, DeadlineError, UnavailableError, OverloadedError),
    )
}
"""Errors that a server tells its clients of."""
_FIELDS = ("advice", "kind", "index", "name")

Fault = Literal["late", "full", "unknown model", "other"]

_ENSEMBLE = re.compile(r"^in ensemble '\w+', ")
# Triton's own words (2.51, recorded in tests/unit/serving/util/test_wire.py). It reports a request
# that waited too long and a queue that is full with one status.
_FAULTS: tuple[tuple[re.Pattern[str], Fault], ...] = (
    (re.compile(r"timeout expired|Deadline Exceeded", re.IGNORECASE), "late"),
    (re.compile(r"maximum queue size"), "full"),
    (re.compile(r"unknown model: '\w+'"), "unknown model"),
)


def to_text(error: ClipDeployError) -> str:
    """Return an error as the text of a Triton error."""
    fields = {name: getattr(error, name, None) for name in _FIELDS}
    document = {"type": type(error).__name__, "reason": error.reason}
    document |= {name: value for name, value in fields.items() if value not in ("", None)}
    return f"{error}{_MARK}{json.dumps(document)}"


def from_text(message: str) -> ClipDeployError | None:
    """Return the error that `to_text` wrote; None if the message is not one of ours."""
    sentence, mark, line = message.rpartition(_MARK)
    if not mark:
        return None
    try:
        document: Any = json.loads(line)
        kind = _TYPES[document.pop("type")]
        return kind(document.pop("reason", sentence), **document)
    except (ValueError, KeyError, TypeError, AttributeError):  # of another version, or cut off
        return None


def own_words(message: str) -> str:
    """Return a Triton message without the ensemble that it went through."""
    return _ENSEMBLE.sub("", message)


def triton_fault(message: str) -> Fault:
    """Classify one of Triton's own messages."""
    return next((fault for pattern, fault in _FAULTS if pattern.search(message)), "other")
