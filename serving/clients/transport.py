"""Calls to the models of a Triton server: connections, deadlines, retries, translated errors.

This module does not know which models there are or which inputs they take.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from serving.clients import forks
from serving.clients.endpoint import Credentials, Endpoint, Protocol, attach
from serving.clients.retry import retried
from serving.errors import (
    DeadlineError,
    InputError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from serving.util.finite import check_count, check_positive
from serving.util.wire import from_text, own_words, triton_fault

T = TypeVar("T")

_SHORTEST_S, _LONGEST_S = 1.0, 5.0
"""Bounds of the seconds to wait for each answer when connecting; between them, the timeout."""


class Calls:
    """Connections to one server, and threads that use them; call `close` at the end.

    Safe to share between threads, and over HTTP with forked processes (`serving.clients.forks`).

    Args:
        url: as for `serving.clients.endpoint.Endpoint.of`.
        timeout: seconds for a call, including all its attempts and the pauses between them.
        attempts: maximum number of attempts of a call; see `serving.clients.retry`.
        threads: number of threads.
        credentials: files for TLS.

    Raises:
        UnavailableError: no server answers, or it is not ready, at the last attempt.
        ServerError: the URL is malformed, or the TLS connection fails.
        InputError: `timeout` is not positive and finite, `attempts` is less than one, or the
            credentials are unusable.
    """

    def __init__(
        self, url: str, *, timeout: float, attempts: int, threads: int, credentials: Credentials
    ) -> None:
        check_positive("timeout", timeout)
        check_count("attempts", attempts)
        self._url, self._timeout, self._attempts = url, timeout, attempts
        self._count, self._inherited = threads, list[Any]()
        self._endpoint: Endpoint = retried(
            lambda left: attach(url, _connecting(left), credentials), attempts, timeout
        )
        self._begin()
        forks.watch(self)
        self.protocol = self._endpoint.module
        self._connection_errors = _connection_errors(self._endpoint.protocol)

    def _begin(self) -> None:
        self._threads = threading.local()
        self._connections: list[Any] = []
        self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="clip-client")

    def after_fork(self) -> None:
        """Forget the connections and threads of the parent process."""
        # Kept, because closing them could wait for the parent's event loop or its gRPC threads.
        self._inherited += [self._connections, self._threads, self._pool]
        self._begin()

    def submit(self, action: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call `action` in one of the threads."""
        return self._pool.submit(action, *arguments)

    def close(self) -> None:
        """Cancel what was submitted and has not begun, and close all connections."""
        self._pool.shutdown(cancel_futures=True)
        while self._connections:
            self._connections.pop().close()

    def config(self, model: str) -> dict[str, Any]:
        """Return the configuration of a model."""

        def request(connection: Any, left: float) -> Any:
            grpc = self._endpoint.protocol == "grpc"
            options = {"client_timeout": max(left, _SHORTEST_S)} if grpc else {}
            return connection.get_model_config(model, **options)

        found = self._call(model, request)
        return found if isinstance(found, dict) else _as_dict(found.config)

    def infer(
        self,
        model: str,
        tensors: list[Any],
        target: str,
        shape: tuple[int, ...],
    ) -> NDArray[np.float32]:
        """Run a model and return one of its float32 outputs, after checking its shape and values.

        The request carries the remaining time as its timeout.

        Args:
            model: name of the model.
            tensors: inputs, as `InferInput` of `self.protocol`.
            target: name of the output.
            shape: shape that the output must have.

        Raises:
            InputError: the server rejected the inputs.
            OverloadedError: the server's queues were full at every attempt.
            UnavailableError: the server did not answer at any attempt.
            ServerError: the server failed, did not answer in time, or answered with something else
                than finite numbers of this shape.
        """

        def request(connection: Any, left: float) -> Any:
            options: dict[str, Any] = {"timeout": int(left * 1e6) or 1}
            if self._endpoint.protocol == "grpc":
                options["client_timeout"] = left
            return connection.infer(model, tensors, **options)

        result = self._call(model, request)
        try:
            array: NDArray[Any] | None = result.as_numpy(target)
        except Exception as error:  # of NumPy, if shape and data differ
            raise self._wrong_answer(model, f"a damaged {target} ({error})", shape) from error
        if array is None:
            raise self._wrong_answer(model, f"no {target}", shape)
        if array.shape != shape or array.dtype != np.float32:
            raise self._wrong_answer(model, f"{target} {array.dtype} {list(array.shape)}", shape)
        if not np.isfinite(array).all():
            raise self._wrong_answer(model, f"{target} with NaN or infinity", shape)
        return array

    def _wrong_answer(self, model: str, got: str, shape: tuple[int, ...]) -> ServerError:
        return ServerError(
            f"expected finite float32 {list(shape)} from {model} at {self._url}, got {got}",
            advice="restart the server, which empties its response cache; if that does not help, "
            "assemble its repository again with `clip-deploy assemble`",
        )

    def _call(self, model: str, action: Callable[[Any, float], Any]) -> Any:
        return retried(
            lambda left: self._attempt(model, action, left), self._attempts, self._timeout
        )

    def _attempt(self, model: str, action: Callable[[Any, float], Any], left: float) -> Any:
        """Call `action` with a connection, within `left` seconds, and translate its errors."""
        deadline = time.monotonic() + left
        try:
            with self._connection(left) as connection:
                return action(connection, left)
        except InferenceServerException as error:
            if triton_fault(error.message()) == "unknown model":
                raise self._unknown_model(model, error.message(), deadline) from error
            raise self._translated(error) from error
        except TimeoutError as error:
            raise self._deadline_error(error) from error
        except self._connection_errors as error:
            raise UnavailableError(
                f"no answer from {self._url}: {error}",
                advice="check that the server is running and that this is its "
                f"{self._endpoint.protocol} port",
            ) from error

    def _translated(self, error: InferenceServerException) -> ServerError | InputError:
        message, status = own_words(error.message()), str(error.status())
        sent = from_text(message)
        if isinstance(sent, InputError):
            return sent
        if isinstance(sent, DeadlineError):
            return self._deadline_error(sent.reason)
        if isinstance(sent, OverloadedError):
            return self._overloaded_error(sent.reason)
        if sent is not None:
            message = str(sent)
        fault = triton_fault(message)
        if status in ("400", "StatusCode.INVALID_ARGUMENT"):
            return InputError(message)
        if status in ("499", "StatusCode.DEADLINE_EXCEEDED") or fault == "late":
            return self._deadline_error(message)
        if fault == "full":
            return self._overloaded_error(message)
        if fault == "unavailable" or status in ("503", "StatusCode.UNAVAILABLE"):
            return UnavailableError(f"{self._url} is not available ({status}): {message}")
        return ServerError(f"{self._url} rejected the request ({status}): {message}")

    def _unknown_model(self, model: str, message: str, deadline: float) -> ServerError:
        """Return the error for a model that the server did not have when it was called.

        A server that starts or stops answers so as well. The model may also have been loaded since.
        """
        left = max(0.1, deadline - time.monotonic())
        options = {"client_timeout": left} if self._endpoint.protocol == "grpc" else {}
        try:
            with self._endpoint.open(left) as connection:
                ready = connection.is_server_ready(**options)
                lacks = ready and not connection.is_model_ready(model, **options)
        except (InferenceServerException, TimeoutError, *self._connection_errors):
            lacks = False
        if lacks:
            return ServerError(
                f"{self._url} does not serve that model ({message})",
                advice="assemble the server's repository again with `clip-deploy assemble`",
            )
        return UnavailableError(
            f"{self._url} is loading or unloading its models: {message}",
            advice="try again later",
        )

    def _overloaded_error(self, reason: str) -> OverloadedError:
        return OverloadedError(
            f"{self._url} is full and rejected the request ({reason})",
            advice="send fewer inputs at a time, or try again later",
        )

    def _deadline_error(self, reason: object) -> DeadlineError:
        return DeadlineError(f"no answer from {self._url} within {self._timeout:g} s: {reason}")

    @contextmanager
    def _connection(self, left: float) -> Iterator[Any]:
        """Yield a connection of this thread, since tritonclient's HTTP client is not thread-safe.

        Over HTTP the timeout belongs to the connection, so a retry, which has less time left, gets
        a connection of its own.
        """
        if self._endpoint.protocol == "http" and left < self._timeout:
            with self._endpoint.open(left) as connection:
                yield connection
            return
        if not hasattr(self._threads, "connection"):
            self._threads.connection = self._endpoint.open(self._timeout)
            self._connections.append(self._threads.connection)
        yield self._threads.connection


def _connecting(left: float) -> float:
    return min(max(left, _SHORTEST_S), _LONGEST_S)


def _connection_errors(protocol: Protocol) -> tuple[type[Exception], ...]:
    """Return the exceptions of other libraries that tritonclient raises on a broken connection."""
    if protocol == "grpc":
        return ()
    from geventhttpclient.response import HTTPParseError

    return OSError, HTTPParseError


def _as_dict(message: Any) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found
