"""Inputs of requests to the Python models, and requests of these models to each other.

Imported only inside Triton's Python stub, which provides `triton_python_backend_utils`.
"""

import math
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from serving.errors import DeadlineError, InputError, OverloadedError, UnavailableError
from serving.util.wire import from_text, own_words, triton_fault


def tensor(request: Any, name: str, *dims: int | None) -> NDArray[Any] | None:
    """Return an input of a request; None if the request does not have it.

    Triton (2.51) stores the batch size in 32 bits. A request of shape [2^32, 1] or [0, 1] passes
    its checks and reaches a model without a batch dimension. The answer would lack it as well, and
    `clip_text` would cache it for every other client.

    Args:
        request: request of Triton.
        name: name of the input.
        dims: expected shape; None allows any length.

    Raises:
        InputError: the input has another shape.
    """
    found = pb_utils.get_input_tensor_by_name(request, name)
    if found is None:
        return None
    array: NDArray[Any] = found.as_numpy()
    fits = array.ndim == len(dims) and all(
        expected in (None, length) for expected, length in zip(dims, array.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("n" if length is None else str(length) for length in dims)
        raise InputError(
            f"input {name!r} has shape {list(array.shape)}, expected [{expected}]",
            advice="send a shape that says how many items there are",
        )
    return array


def required(request: Any, name: str, *dims: int | None) -> NDArray[Any]:
    """Return an input of a request; see `tensor`.

    Raises:
        InputError: the request does not have the input, or it has another shape.
    """
    array = tensor(request, name, *dims)
    if array is None:
        raise InputError(f"the request has no input {name!r}")
    return array


class ModelError(Exception):
    """Error of another model of this server that our code did not raise.

    Triton (2.51) reports every error of a called model with code INTERNAL.
    """


def infer(
    model: str, source: str, data: NDArray[Any], target: str, seconds: float = math.inf
) -> Any:
    """Call another model of this server and return one of its outputs.

    Args:
        model: name of the model.
        source: name of its input.
        data: the input.
        target: name of the output.
        seconds: timeout; models with a queue policy reject requests that wait for longer.

    Raises:
        ClipDeployError: the error of one of our models, with its fields.
        OverloadedError: Triton's queue for the model is full.
        UnavailableError: the server is starting or stopping.
        DeadlineError: the request waited for longer than `seconds`.
        ModelError: the model failed in another way.
    """
    response = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[target],
        inputs=[pb_utils.Tensor(source, data)],
        timeout=0 if seconds == math.inf else max(1, int(seconds * 1e6)),
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    ).exec()
    if response.has_error():
        message = own_words(response.error().message())
        if (error := from_text(message)) is not None:
            raise error
        fault = triton_fault(message)
        if fault == "full":
            raise OverloadedError(f"{model} is overloaded", advice="try again later")
        if fault in ("unknown model", "unavailable"):  # the server starts or stops
            raise UnavailableError(f"{model} is not available: {message}")
        if fault == "late":
            raise DeadlineError(f"the deadline passed while the request waited for {model}")
        raise ModelError(f"{model}: {message}")
    return pb_utils.get_output_tensor_by_name(response, target).as_numpy()


def deadline_s(request: Any) -> float:
    """Return the timeout of a request in seconds; infinite without one."""
    return float(request.timeout() * 1e-6) or math.inf
