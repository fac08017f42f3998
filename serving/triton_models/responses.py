"""What our Python models answer where they cannot answer with a result.

A client learns what it can act on: what is wrong with its request, or an id that the operator finds
in the server's log. Paths, tracebacks and the names of shared memory stay in the log. An exception
that leaves a model.py would carry all of them to the client: Triton's Python backend sends the
whole traceback.

Needs `triton_python_backend_utils`, which only Triton's Python stub has, when it is called.
"""

import re
import secrets
import traceback
from collections.abc import Callable
from typing import Any

from serving.errors import InputError

_ID_BYTES = 4
# What a message of Triton, or of another model, may hold that is not a client's business: paths,
# tracebacks, and the region that Triton names where shared memory runs out.
_INTERNAL = re.compile(r"[/\n]|shared memory", re.IGNORECASE)


def answered(model: str, respond: Callable[[Any], Any], request: Any) -> Any:
    """The response that `respond` makes of `request`, or the error that it ended with."""
    try:
        return respond(request)
    except Exception as error:  # raised out of the model, it would tell the client too much
        return refused(model, error)


def refused(model: str, error: Exception) -> Any:
    """The response to a request of `model` that ended with `error`.

    An `InputError` is told as it is, with code INVALID_ARG. All else is `internal error` and an id,
    with code INTERNAL; the log has the id and the traceback.
    """
    import triton_python_backend_utils as pb_utils

    if isinstance(error, InputError):
        return response(str(error), pb_utils.TritonError.INVALID_ARG)
    name = secrets.token_hex(_ID_BYTES)
    trace = "".join(traceback.format_exception(error))
    pb_utils.Logger.log_error(f"internal error {name} in {model}: {trace}")
    return response(
        f"internal error {name}; the server's log has it", pb_utils.TritonError.INTERNAL
    )


def full(model: str, most: int, count: int) -> list[Any]:
    """Responses to `count` requests that came when `most`, as many as may, waited for `model`."""
    import triton_python_backend_utils as pb_utils

    message = f"{model} is full: {most} requests wait for it; try again later"
    return [response(message, pb_utils.TritonError.UNAVAILABLE) for _ in range(count)]


def response(message: str, code: int) -> Any:
    """An error of code `code`, one of `pb_utils.TritonError`, as a response."""
    import triton_python_backend_utils as pb_utils

    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def may_be_told(message: str) -> bool:
    """Whether a message that is not ours, such as Triton's, holds nothing of the server's own."""
    return _INTERNAL.search(message) is None
