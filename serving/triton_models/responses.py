"""Responses of the Python models, and the count of their outcomes.

A client receives what it can act on: the fault of its request, or an id that the operator can find
in the server's log. Paths, tracebacks and names of shared memory stay in the log. An exception
raised out of a model.py would disclose them, because Triton's Python backend sends the whole
traceback to the client.

Imported only inside Triton's Python stub, which provides `triton_python_backend_utils`.
"""

import secrets
import traceback
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from serving.errors import (
    DeadlineError,
    InputError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from serving.triton_models.counters import Counters, Outcome
from serving.util.wire import to_text

_ID_BYTES = 4


class Responses:
    """Responses of one model, each of which is counted.

    Args:
        model: name of the model.
        counters: counters of the model.
    """

    def __init__(self, model: str, counters: Counters) -> None:
        self._model, self._counters = model, counters

    def of(self, respond: Callable[[Any], list[Any] | None], request: Any) -> Any:
        """Return the response with the tensors that `respond` returns for `request`.

        An exception becomes an error response. If `respond` returns None, so does this method: the
        response will be sent later.
        """
        try:
            tensors = respond(request)
            return None if tensors is None else self.ok(tensors)
        except Exception as error:  # must not leave the model; see the module docstring
            return self.failed(error)

    def ok(self, tensors: list[Any]) -> Any:
        """Return the response with these tensors."""
        response = pb_utils.InferenceResponse(tensors)
        self._counters.requests("ok")
        return response

    def failed(self, error: Exception) -> Any:
        """Return the error response to a request that failed with `error`.

        - `InputError`: sent unchanged, with code INVALID_ARG.
        - `DeadlineError`, `UnavailableError`: sent unchanged, with code UNAVAILABLE.
        - `ServerError` from another model: sent unchanged, with code INTERNAL, so that the client
          receives the id that the log has next to the traceback.
        - Any other exception: logged with a traceback and a new id; the client receives a
          `ServerError` with the id, with code INTERNAL.
        """
        outcome, code = _classified(error)
        self._counters.requests(outcome)
        if not isinstance(error, InputError | ServerError):
            error_id = secrets.token_hex(_ID_BYTES)
            trace = "".join(traceback.format_exception(error))
            pb_utils.Logger.log_error(f"internal error {error_id} in {self._model}: {trace}")
            error = ServerError(f"internal error {error_id}; the server's log has it")
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(to_text(error), code))

    def full(self, model: str, max_queue: int, count: int) -> list[Any]:
        """Return `count` error responses that say that the queue of `model` is full."""
        error = OverloadedError(
            f"{model} is full: {max_queue} requests wait for it", advice="try again later"
        )
        return [self.failed(error) for _ in range(count)]


def _classified(error: Exception) -> tuple[Outcome, int]:
    """Return the outcome that an error is counted as, and its status code."""
    codes = pb_utils.TritonError
    match error:
        case InputError():
            return "invalid", codes.INVALID_ARG
        case OverloadedError():
            return "overloaded", codes.UNAVAILABLE
        case DeadlineError() | UnavailableError():
            return "cancelled", codes.UNAVAILABLE
        case _:
            return "error", codes.INTERNAL
