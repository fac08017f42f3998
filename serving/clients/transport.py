"""Calls to the models of a Triton server: connections, deadlines, attempts, errors in our words.

Does not know: which models there are, or what they take.
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
from serving.util.wire import from_text, own_words, triton_fault


class Calls:
    """Calls to one server; safe to share between threads. `close` it at the end.

    Args:
        url: as `serving.clients.endpoint.Endpoint.of` takes it.
        timeout: seconds for a call, all its attempts and the pauses between them.
        attempts: how often a call is tried, at most; see `serving.clients.retry`.
        credentials: for TLS.

    Raises:
        UnavailableError: no server is there, or it is not ready, after these attempts.
        ServerError: this is no such URL, or no connection with these credentials.
        InputError: `attempts` is less than one, or credentials cannot be used.
    """

    def __init__(
        self, url: str, *, timeout: float, attempts: int, credentials: Credentials
    ) -> None:
        if attempts < 1:
            raise InputError(f"attempts is {attempts}; expected 1, to ask once, or more")
        self._url, self._timeout, self._attempts = url, timeout, attempts
        self._threads = threading.local()
        self._connections: list[Any] = []
        self._endpoint: Endpoint = retried(
            lambda _: attach(url, credentials=credentials), attempts, timeout
        )
        self.protocol, self._broken = self._endpoint.module, _broken(self._endpoint.protocol)

    def close(self) -> None:
        """End all connections."""
        while self._connections:
            self._connections.pop().close()

    def config(self, model: str) -> dict[str, Any]:
        """A model's configuration."""
        found = self._call(lambda connection, _: connection.get_model_config(model))
        return found if isinstance(found, dict) else _as_dict(found.config)

    def infer(self, model: str, tensors: list[Any], target: str, parameters: dict[str, Any]) -> Any:
        """The output `target` of a model, an array; the server is told how long it may take.

        Args:
            tensors: `InferInput`s of `self.protocol`.

        Raises:
            InputError: the server says that the inputs cannot be used.
            OverloadedError: the server was full, every time.
            UnavailableError: the server was not there, every time.
            ServerError: it did not answer in time, or failed.
        """

        def ask(connection: Any, left: float) -> Any:
            options: dict[str, Any] = {"timeout": int(left * 1e6) or 1, "parameters": parameters}
            if self._endpoint.protocol == "grpc":
                options["client_timeout"] = left
            return connection.infer(model, tensors, **options)

        return self._call(ask).as_numpy(target)

    def _call(self, action: Callable[[Any, float], Any]) -> Any:
        return retried(lambda left: self._attempt(action, left), self._attempts, self._timeout)

    def _attempt(self, action: Callable[[Any, float], Any], left: float) -> Any:
        """Do `action` with a connection, within `left` seconds; errors become ours."""
        try:
            with self._connection(left) as connection:
                return action(connection, left)
        except InferenceServerException as error:
            raise self._translated(error) from error
        except TimeoutError as error:
            raise self._late(error) from error
        except self._broken as error:
            raise UnavailableError(
                f"no answer from {self._url}: {error}. Was it stopped, or is this not its "
                f"{self._endpoint.protocol} port?"
            ) from error

    def _translated(self, error: InferenceServerException) -> ServerError | InputError:
        message, status = own_words(error.message()), str(error.status())
        sent = from_text(message)
        if isinstance(sent, InputError):
            return sent
        if isinstance(sent, DeadlineError):
            return self._late(sent.reason)
        if isinstance(sent, OverloadedError):
            return self._overloaded(sent.reason)
        if sent is not None:
            message = str(sent)
        fault = triton_fault(message)
        if status in ("400", "StatusCode.INVALID_ARGUMENT"):
            return InputError(message)
        if status in ("499", "StatusCode.DEADLINE_EXCEEDED") or fault == "late":
            return self._late(message)
        if fault == "unknown model":
            return ServerError(
                f"{self._url} does not serve that model ({message})",
                advice="assemble its repository again with `clip-deploy assemble`",
            )
        if fault == "full":
            return self._overloaded(message)
        if status in ("503", "StatusCode.UNAVAILABLE"):
            return UnavailableError(f"{self._url} is not available ({status}): {message}")
        return ServerError(f"{self._url} refused the request ({status}): {message}")

    def _overloaded(self, reason: str) -> OverloadedError:
        return OverloadedError(
            f"{self._url} is full, and refused the request ({reason})",
            advice="send less at a time, or try again later",
        )

    def _late(self, reason: object) -> DeadlineError:
        return DeadlineError(f"no answer from {self._url} within {self._timeout:g} s: {reason}")

    @contextmanager
    def _connection(self, left: float) -> Iterator[Any]:
        """A connection of this thread: tritonclient's HTTP client belongs to one thread.

        Over HTTP, timeouts are a connection's; so what is asked again, with less time, gets one
        of its own.
        """
        if self._endpoint.protocol == "http" and left < self._timeout:
            with self._endpoint.open(left) as connection:
                yield connection
            return
        if not hasattr(self._threads, "connection"):
            self._threads.connection = self._endpoint.open(self._timeout)
            self._connections.append(self._threads.connection)
        yield self._threads.connection


def _broken(protocol: Protocol) -> tuple[type[Exception], ...]:
    """What tritonclient raises, besides its own, when a connection breaks."""
    if protocol == "grpc":
        return ()
    from geventhttpclient.response import HTTPParseError

    return OSError, HTTPParseError


def _as_dict(message: Any) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found
