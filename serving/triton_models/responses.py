"""Responses of our Python models that are errors.

A client learns what it can act on: what is wrong with its request, or an id that the operator finds
in the server's log. Paths, tracebacks and the names of shared memory stay in the log. An exception
that left a model.py would carry all of them to the client: Triton's Python backend sends the whole
traceback.

Needs `triton_python_backend_utils`, which only Triton's Python stub has, when it is called.
"""

import secrets
import traceback
from collections.abc import Callable
from typing import Any

from serving.errors import (
    ClipDeployError,
    DeadlineError,
    InputError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from serving.util.wire import to_text

_ID_BYTES = 4


def answered(model: str, respond: Callable[[Any], Any], request: Any) -> Any:
    """Return the response that `respond` makes of `request`, or the error that it ended with."""
    try:
        return respond(request)
    except Exception as error:  # raised out of the model, it would disclose too much
        return refused(model, error)


def refused(model: str, error: Exception) -> Any:
    """Return the response to a request of `model` that ended with `error`.

    An `InputError` is sent as it is, with code INVALID_ARG, an overload or a missed deadline with
    code UNAVAILABLE. Anything else becomes a `ServerError`, `internal error` and an id, with code
    INTERNAL; the log has the id and the traceback. A `ServerError` that another model answered with
    is passed on: the id that its client learns is the one beside the traceback.
    """
    import triton_python_backend_utils as pb_utils

    if isinstance(error, InputError):
        return _response(error, pb_utils.TritonError.INVALID_ARG)
    if isinstance(error, DeadlineError | UnavailableError):
        return _response(error, pb_utils.TritonError.UNAVAILABLE)
    if not isinstance(error, ServerError):
        name = secrets.token_hex(_ID_BYTES)
        trace = "".join(traceback.format_exception(error))
        pb_utils.Logger.log_error(f"internal error {name} in {model}: {trace}")
        error = ServerError(f"internal error {name}; the server's log has it")
    return _response(error, pb_utils.TritonError.INTERNAL)


def full(model: str, most: int, count: int) -> list[Any]:
    """Return the responses to `count` requests that came when `most` waited for `model`."""
    error = OverloadedError(
        f"{model} is full: {most} requests wait for it", advice="try again later"
    )
    return [refused(model, error) for _ in range(count)]


def _response(error: ClipDeployError, code: int) -> Any:
    import triton_python_backend_utils as pb_utils

    return pb_utils.InferenceResponse(error=pb_utils.TritonError(to_text(error), code))
