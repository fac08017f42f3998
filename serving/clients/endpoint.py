"""How a client gets to a Triton server: URLs, TLS, the key of the administrative APIs.

Does not know: what the server runs, or how it is started (`triton.py`).
"""

import http.client
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tritonclient.utils import InferenceServerException

from serving.errors import InputError, ServerError, UnavailableError

Protocol = Literal["grpc", "http"]

_SCHEMES: Mapping[str, tuple[Protocol, bool]] = {
    "grpc": ("grpc", False),
    "http": ("http", False),
    "grpcs": ("grpc", True),
    "https": ("http", True),
}
"""The protocol, and whether TLS is around it."""
# Without these gRPC leaves a server that was away alone for 1 s, and for up to two minutes after
# some attempts; how often is asked again is decided in `serving.clients.retry`. Whoever
# gives arguments gives them all: -1 is no limit of our own to the size of messages.
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
]
_ADMIN_HEADERS: Mapping[Protocol, str] = {
    "http": "admin-key",
    "grpc": "triton-grpc-protocol-admin-key",
}
# What OpenSSL (HTTP) and BoringSSL (gRPC) say, and what it means; the first that fits is told.
_TLS_TROUBLE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), meaning)
    for pattern, meaning in (
        (r"certificate has expired", "its certificate has expired; the operator is to renew it"),
        (
            r"hostname mismatch|ip address mismatch|not in peer certificate|verification check",
            "its certificate is of another host; use the name that stands in it",
        ),
        (
            r"certificate.verify.failed",
            "its certificate is from an authority that is not trusted here; name the file of the "
            "one that signed it (--ca)",
        ),
        (r"wrong.version.number|record layer failure", "it does not speak TLS at this port"),
        (
            r"alert|handshake|(connection|socket) (reset|closed)|broken pipe|eof ",
            "it ended the connection. Is this a port with TLS? If the server asks clients for a "
            "certificate, show one that it trusts and that has not expired (--cert, --key)",
        ),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a client trusts, and shows, over grpcs:// and https://; PEM files."""

    ca: Path | None = None
    """Authorities that the server's certificate may come from; without, the public ones."""
    certificate: Path | None = None
    """The client's own, where the server asks for one."""
    key: Path | None = None
    """Of the certificate, not encrypted."""

    def check(self) -> None:
        """Read the files as a client would.

        Raises:
            InputError: a file is missing or is no PEM, or certificate and key do not belong
                together.
        """
        if (self.certificate is None) != (self.key is None):
            raise InputError("a client shows a certificate and its key: give both, or neither")
        for file in (self.ca, self.certificate, self.key):
            if file is not None and not file.is_file():
                raise InputError(f"{file}: no such file; expected a PEM file for TLS")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
            given = ", ".join(str(f) for f in (self.ca, self.certificate, self.key) if f)
            raise InputError(
                f"{given} cannot be used for TLS ({error}); expected PEM files: the authority, a "
                "certificate, its key without a password"
            ) from error


NO_CREDENTIALS = Credentials()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One protocol of one server."""

    url: str
    protocol: Protocol
    address: str
    """host:port"""
    credentials: Credentials | None
    """None where nothing is encrypted."""

    @classmethod
    def of(cls, url: str, credentials: Credentials = NO_CREDENTIALS) -> "Endpoint":
        """The endpoint at grpc://, http://, grpcs:// or https://host:port.

        Raises:
            ServerError: it is none of these.
            InputError: there are credentials that would not be used, or cannot be.
        """
        scheme, _, address = url.partition("://")
        if scheme not in _SCHEMES or not re.fullmatch(r"[^/]+:\d+", address):
            raise ServerError(
                "expected grpc://host:port or http://host:port of a server, or grpcs:// or "
                f"https:// with TLS, got {url!r}"
            )
        protocol, encrypted = _SCHEMES[scheme]
        if not encrypted and credentials != NO_CREDENTIALS:
            raise InputError(
                f"{url} is not encrypted, so certificates are of no use; give {scheme}s://{address}"
                ", or leave them out"
            )
        credentials.check()
        return cls(url, protocol, address, credentials if encrypted else None)

    @property
    def module(self) -> ModuleType:
        """`tritonclient.grpc` or `tritonclient.http`."""
        if self.protocol == "grpc":
            import tritonclient.grpc as module
        else:
            import tritonclient.http as module
        found: ModuleType = module
        return found

    def open(self, timeout: float) -> Any:
        """A client of tritonclient; of HTTP it is for one thread, and `timeout` is in seconds."""
        if self.protocol == "grpc":
            options = self._grpc_options()
        else:
            limits = {"connection_timeout": timeout, "network_timeout": timeout}
            options = limits | self._http_options()
        return self.module.InferenceServerClient(self.address, **options)

    def _grpc_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"channel_args": _CHANNEL}
        if (tls := self.credentials) is None:
            return options
        names = ("root_certificates", "certificate_chain", "private_key")
        files = zip(names, (tls.ca, tls.certificate, tls.key), strict=True)
        options["ssl"] = True
        return options | {name: str(file) for name, file in files if file is not None}

    def _http_options(self) -> dict[str, Any]:
        if (tls := self.credentials) is None:
            return {}
        names = ("ca_certs", "certfile", "keyfile")
        files = zip(names, (tls.ca, tls.certificate, tls.key), strict=True)
        options = {name: str(file) for name, file in files if file is not None}
        return {"ssl": True, "ssl_options": options}

    def ready(self, timeout: float) -> bool:
        """Whether the server is ready; raises what tritonclient does where none answers.

        Asks for metadata first: Triton's metrics port answers 200 to any question, also to
        "ready?".
        """
        options = {"client_timeout": timeout} if self.protocol == "grpc" else {}
        with self.open(timeout) as client:
            client.get_server_metadata(**options)
            return bool(client.is_server_ready(**options))

    def unreachable(self, error: Exception) -> ServerError:
        """What to tell where nothing, or something else, answers."""
        if self.credentials is not None:
            for pattern, meaning in _TLS_TROUBLE:
                if pattern.search(str(error)):
                    return ServerError(f"no connection to {self.url}: {meaning} ({error})")
        return UnavailableError(
            f"no Triton server answers at {self.url} ({error}). Is it started, and is this its "
            f"{self.protocol} port? By default 8000 is http and 8001 is grpc; with TLS, say grpcs "
            "or https"
        )


def attach(url: str, timeout: float = 5.0, credentials: Credentials = NO_CREDENTIALS) -> Endpoint:
    """Check that the server at `url` answers and is ready, within `timeout` seconds a question.

    `url` is as `Endpoint.of` takes it. Raises UnavailableError that says what was tried, and
    ServerError on what asking again cannot mend.
    """
    endpoint = Endpoint.of(url, credentials)
    try:
        ready = endpoint.ready(timeout)
    except (InferenceServerException, OSError, http.client.HTTPException, ValueError) as error:
        raise endpoint.unreachable(error) from error
    if not ready:
        raise UnavailableError(
            f"the Triton server at {url} answers, but is not ready: its models are still loading, "
            "or one of them failed to, as its log says"
        )
    return endpoint


def admin_headers(protocol: Protocol, key: str | None) -> dict[str, str]:
    """What a request to an administrative API carries; nothing without a key."""
    return {} if key is None else {_ADMIN_HEADERS[protocol]: key}
