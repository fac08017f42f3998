"""Endpoints of a Triton server: URLs, TLS, and the key of the administrative APIs.

This module does not know what the server runs or how it is started (`serving.triton`).
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

from serving.clients.forks import prepare
from serving.errors import InputError, ServerError, UnavailableError, excerpt
from serving.util.finite import check_positive

Protocol = Literal["grpc", "http"]

_SCHEMES: Mapping[str, tuple[Protocol, bool]] = {
    "grpc": ("grpc", False),
    "http": ("http", False),
    "grpcs": ("grpc", True),
    "https": ("http", True),
}
"""URL scheme to protocol, and whether the connection uses TLS."""
# By default gRPC waits 1 s before it reconnects, and up to two minutes after several failures;
# `serving.clients.retry` decides about retries instead. `channel_args` replaces the defaults of
# tritonclient, so its unlimited message sizes (-1) are repeated here.
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
# Messages of OpenSSL (HTTP) and BoringSSL (gRPC), each with a reason and an advice for the user.
# The first match applies.
_TLS_ERRORS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), reason, advice)
    for pattern, reason, advice in (
        (
            r"certificate has expired",
            "the server's certificate has expired",
            "ask the operator of the server to renew it",
        ),
        (
            r"hostname mismatch|ip address mismatch|not in peer certificate|verification check",
            "the server's certificate is for another host",
            "use the host name in the certificate",
        ),
        (
            r"certificate.verify.failed",
            "the server's certificate is from an authority that is not trusted here",
            "give the PEM file of the authority that signed it (--ca)",
        ),
        (
            r"wrong.version.number|record layer failure",
            "the server does not use TLS on this port",
            "use the port with TLS, or a URL without TLS (grpc:// or http://)",
        ),
        (
            r"alert|handshake|(connection|socket) (reset|closed)|broken pipe|eof ",
            "the server closed the connection",
            "check that this port uses TLS; if the server requires a client certificate, give one "
            "that it trusts and that has not expired (--cert, --key)",
        ),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """PEM files with which a client verifies the server and identifies itself over TLS."""

    ca: Path | None = None
    """Certificate authorities trusted to sign the server's certificate. None: the public ones."""
    certificate: Path | None = None
    """Certificate of the client, for servers that require one."""
    key: Path | None = None
    """Unencrypted private key of `certificate`."""

    def check(self) -> None:
        """Load the files into a TLS context, as a client does, to find errors early.

        Raises:
            InputError: a file is missing or is not PEM, or the certificate and the key do not
                belong together.
        """
        if (self.certificate is None) != (self.key is None):
            raise InputError(
                "expected a client certificate together with its key, got only one of them",
                advice="give both, or neither",
            )
        for file in (self.ca, self.certificate, self.key):
            if file is not None and not file.is_file():
                raise InputError(f"{file}: no such file", advice="give a PEM file for TLS")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
            given = ", ".join(str(f) for f in (self.ca, self.certificate, self.key) if f)
            raise InputError(
                f"{given} cannot be used for TLS ({error})",
                advice="give PEM files: the certificate authority, the client certificate, and its "
                "private key without a password",
            ) from error


NO_CREDENTIALS = Credentials()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address of one protocol of one server."""

    url: str
    protocol: Protocol
    address: str
    """`host:port`"""
    credentials: Credentials | None
    """None without TLS."""

    @classmethod
    def of(cls, url: str, credentials: Credentials = NO_CREDENTIALS) -> "Endpoint":
        """Return the endpoint of a URL: grpc://, http://, grpcs:// or https://host:port.

        Raises:
            ServerError: the URL has none of these forms.
            InputError: there are credentials although the URL is not encrypted, or they are
                unusable.
        """
        scheme, _, address = url.partition("://")
        if scheme not in _SCHEMES or not re.fullmatch(r"[^/]+:\d+", address):
            raise ServerError(
                "expected grpc://host:port or http://host:port, or grpcs:// or https:// with TLS, "
                f"got {excerpt(url, 200)}"
            )
        protocol, encrypted = _SCHEMES[scheme]
        if not encrypted and credentials != NO_CREDENTIALS:
            raise InputError(
                f"{url} is not encrypted, so certificates have no effect",
                advice=f"give {scheme}s://{address}, or leave out the certificates",
            )
        credentials.check()
        return cls(url, protocol, address, credentials if encrypted else None)

    @property
    def module(self) -> ModuleType:
        """The module `tritonclient.grpc` or `tritonclient.http`."""
        if self.protocol == "grpc":
            import tritonclient.grpc as module
        else:
            import tritonclient.http as module
        found: ModuleType = module
        return found

    def open(self, timeout: float) -> Any:
        """Return a new client of tritonclient; an HTTP client belongs to one thread.

        Args:
            timeout: seconds to connect and to wait for an answer, for HTTP; gRPC takes its timeout
                with each call.

        Raises:
            ServerError: the library of the protocol does not work in this forked process.
        """
        prepare(self.protocol)
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
        """Return whether the server is ready; errors of tritonclient pass through.

        Requests the metadata first: Triton's metrics port answers 200 to every request, the
        readiness probe included.
        """
        options = {"client_timeout": timeout} if self.protocol == "grpc" else {}
        with self.open(timeout) as client:
            client.get_server_metadata(**options)
            return bool(client.is_server_ready(**options))

    def unreachable(self, error: Exception) -> ServerError:
        """Return the error to raise when no Triton server answers."""
        if self.credentials is not None:
            for pattern, reason, advice in _TLS_ERRORS:
                if pattern.search(str(error)):
                    return ServerError(
                        f"no connection to {self.url}: {reason} ({error})", advice=advice
                    )
        return UnavailableError(
            f"no Triton server answers at {self.url} ({error})",
            advice=f"check that it is running and that this is its {self.protocol} port (the "
            "defaults are 8000 for http and 8001 for grpc); with TLS, use grpcs:// or https://",
        )


def attach(url: str, timeout: float = 5.0, credentials: Credentials = NO_CREDENTIALS) -> Endpoint:
    """Return the endpoint of `url` after checking that its server answers and is ready.

    Args:
        url: as for `Endpoint.of`.
        timeout: seconds for each of the two requests.
        credentials: files for TLS.

    Raises:
        UnavailableError: no server answers, or it is not ready.
        ServerError: the connection fails in a way that a retry cannot fix, or `url` is malformed.
        InputError: the credentials are unusable, or `timeout` is not positive and finite.
    """
    check_positive("timeout", timeout)
    endpoint = Endpoint.of(url, credentials)
    try:
        ready = endpoint.ready(timeout)
    except (InferenceServerException, OSError, http.client.HTTPException, ValueError) as error:
        raise endpoint.unreachable(error) from error
    if not ready:
        raise UnavailableError(
            f"the Triton server at {url} answers but is not ready: its models are still loading, "
            "or one of them failed to load",
            advice="try again later, or read the server's log",
        )
    return endpoint


def admin_headers(protocol: Protocol, key: str | None) -> dict[str, str]:
    """Return the headers of a request to an administrative API; none without a key."""
    return {} if key is None else {_ADMIN_HEADERS[protocol]: key}
