"""Error responses of the Python models.

A client receives what it can act on: the fault of its request, or an id that the operator can find
in the server's log. Paths, tracebacks and names of shared memory stay in the log. An exception
raised out of a model.py would disclose them, because Triton's Python backend sends the whole
traceback to the client.

The functions import `triton_python_backend_utils`, which exists only in Triton's Python stub.
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
    """Return the response of `respond` to `request`; an exception becomes an error response."""
    try:
        return respond(request)
    except Exception as error:  # must not leave the model; see the module docstring
        return refused(model, error)


def refused(model: str, error: Exception) -> Any:
    """Return the error response to a request of `model` that failed with `error`.

    - `InputError`: sent unchanged, with code INVALID_ARG.
    - `DeadlineError`, `UnavailableError`: sent unchanged, with code UNAVAILABLE.
    - `ServerError` from another model: sent unchanged, with code INTERNAL, so that the client
      receives the id that the log has next to the traceback.
    - Any other exception: logged with a traceback and a new id; the client receives a `ServerError`
      with the id, with code INTERNAL.
    """
    import triton_python_backend_utils as pb_utils

    if isinstance(error, InputError):
        return _response(error, pb_utils.TritonError.INVALID_ARG)
    if isinstance(error, DeadlineError | UnavailableError):
        return _response(error, pb_utils.TritonError.UNAVAILABLE)
    if not isinstance(error, ServerError):
        error_id = secrets.token_hex(_ID_BYTES)
        trace = "".join(traceback.format_exception(error))
        pb_utils.Logger.log_error(f"internal error {error_id} in {model}: {trace}")
        error = ServerError(f"internal error {error_id}; the server's log has it")
    return _response(error, pb_utils.TritonError.INTERNAL)


def full(model: str, max_queue: int, count: int) -> list[Any]:
    """Return `count` error responses that say that the queue of `model` is full."""
    error = OverloadedError(
        f"{model} is full: {max_queue} requests wait for it", advice="try again later"
    )
    return [refused(model, error) for _ in range(count)]


def _response(error: ClipDeployError, code: int) -> Any:
    import triton_python_backend_utils as pb_utils

    return pb_utils.InferenceResponse(error=pb_utils.TritonError(to_text(error), code))
