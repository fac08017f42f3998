"""Calls to the models of a Triton server: connections, deadlines, retries, translated errors.

This module does not know which models there are or which inputs they take.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tritonclient.utils import InferenceServerException

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


class Calls:
    """Connections to one server. Safe to share between threads; call `close` at the end.

    Args:
        url: as for `serving.clients.endpoint.Endpoint.of`.
        timeout: seconds for a call, including all its attempts and the pauses between them.
        attempts: maximum number of attempts of a call; see `serving.clients.retry`.
        credentials: files for TLS.

    Raises:
        UnavailableError: no server answers, or it is not ready, at the last attempt.
        ServerError: the URL is malformed, or the TLS connection fails.
        InputError: `timeout` is not positive and finite, `attempts` is less than one, or the
            credentials are unusable.
    """

    def __init__(
        self, url: str, *, timeout: float, attempts: int, credentials: Credentials
    ) -> None:
        check_positive("timeout", timeout)
        check_count("attempts", attempts)
        self._url, self._timeout, self._attempts = url, timeout, attempts
        self._threads = threading.local()
        self._connections: list[Any] = []
        self._endpoint: Endpoint = retried(
            lambda _: attach(url, credentials=credentials), attempts, timeout
        )
        self.protocol = self._endpoint.module
        self._connection_errors = _connection_errors(self._endpoint.protocol)

    def close(self) -> None:
        """Close all connections."""
        while self._connections:
            self._connections.pop().close()

    def config(self, model: str) -> dict[str, Any]:
        """Return the configuration of a model."""
        found = self._call(lambda connection, _: connection.get_model_config(model))
        return found if isinstance(found, dict) else _as_dict(found.config)

    def infer(self, model: str, tensors: list[Any], target: str) -> Any:
        """Run a model and return one of its outputs as an array.

        The request carries the remaining time as its timeout.

        Args:
            model: name of the model.
            tensors: inputs, as `InferInput` of `self.protocol`.
            target: name of the output.

        Raises:
            InputError: the server rejected the inputs.
            OverloadedError: the server's queues were full at every attempt.
            UnavailableError: the server did not answer at any attempt.
            ServerError: the server failed, or did not answer in time.
        """

        def request(connection: Any, left: float) -> Any:
            options: dict[str, Any] = {"timeout": int(left * 1e6) or 1}
            if self._endpoint.protocol == "grpc":
                options["client_timeout"] = left
            return connection.infer(model, tensors, **options)

        return self._call(request).as_numpy(target)

    def _call(self, action: Callable[[Any, float], Any]) -> Any:
        return retried(lambda left: self._attempt(action, left), self._attempts, self._timeout)

    def _attempt(self, action: Callable[[Any, float], Any], left: float) -> Any:
        """Call `action` with a connection, within `left` seconds, and translate its errors."""
        try:
            with self._connection(left) as connection:
                return action(connection, left)
        except InferenceServerException as error:
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
        if fault == "unknown model":
            return ServerError(
                f"{self._url} does not serve that model ({message})",
                advice="assemble the server's repository again with `clip-deploy assemble`",
            )
        if fault == "full":
            return self._overloaded_error(message)
        if status in ("503", "StatusCode.UNAVAILABLE"):
            return UnavailableError(f"{self._url} is not available ({status}): {message}")
        return ServerError(f"{self._url} rejected the request ({status}): {message}")

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
