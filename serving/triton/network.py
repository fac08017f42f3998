"""Addresses, ports, TLS files and the administrative key of the embedded server.

By default the server listens on loopback only. `Exposure.describe` says what an operator exposes by
choosing another address; SECURITY.md says which uses that is suitable for.
"""

import errno
import ipaddress
import re
import socket
import ssl
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from serving.errors import InputError, ServerError

HOST = "127.0.0.1"
ADMIN_APIS = ("model-repository", "shared-memory", "statistics", "trace", "logging")
"""APIs that require the administrative key. Triton restricts APIs by nine names, the same for HTTP
and gRPC and in 2.51 and 26.x (src/restricted_features.h); clients use the others, `OPEN_APIS`."""
OPEN_APIS = ("health", "metadata", "model-config", "inference")
_MAX_PORT = 65535
_KEY = re.compile(r"[A-Za-z0-9_-]{16,}")


class Ports(NamedTuple):
    """TCP ports of a server."""

    http: int
    grpc: int
    metrics: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """PEM files for TLS over gRPC.

    Triton reads them once, when it starts; restart it after a certificate was renewed.
    """

    certificate: Path
    """Server certificate, followed by the intermediate certificates."""
    key: Path
    """Unencrypted private key of the certificate."""
    client_ca: Path | None = None
    """Certificate authorities for client certificates. None: clients need no certificate."""

    def check(self) -> None:
        """Check that the files can be loaded. Triton itself reports a bad file as a port in use.

        Raises:
            InputError: a file is missing or is not PEM, or the key does not match the certificate.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        files = [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: no such file; expected a PEM file for TLS")
        try:
            context.load_cert_chain(self.certificate, self.key, password="")
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
            raise InputError(
                f"{', '.join(map(str, files))} cannot serve TLS ({error}); expected PEM files: a "
                "certificate, its key without a password, and the authorities of clients"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """Addresses that a server listens on.

    Triton does not support TLS over HTTP. With TLS, HTTP therefore listens on loopback whatever
    `host` is: no unencrypted traffic leaves this machine, while a TLS-terminating proxy and our own
    readiness check can still reach it. Metrics always listen on loopback, because they disclose how
    much each model is used.
    """

    host: str = HOST
    """IPv4 address of this machine, or 0.0.0.0 for all of its addresses."""
    tls: ServerTls | None = None

    @property
    def http(self) -> str:
        """Address that HTTP listens on."""
        return HOST if self.tls else self.host

    @property
    def reached(self) -> str:
        """Address at which clients on this machine reach `host`."""
        return HOST if self.host == "0.0.0.0" else self.host

    def check(self) -> None:
        """Validate the address and the TLS files before a server is started.

        Raises:
            InputError: `host` is not an IPv4 address, or the TLS files cannot be used.
        """
        try:
            ipaddress.IPv4Address(self.host)
        except ValueError as error:
            raise InputError(
                f"expected an IPv4 address to listen on, such as {HOST}, or 0.0.0.0 for all "
                f"addresses of this machine, got {self.host!r}"
            ) from error
        if self.tls is not None:
            self.tls.check()

    def urls(self, ports: Ports) -> tuple[str, str]:
        """Return the URLs of HTTP and gRPC for clients on this machine."""
        http = HOST if self.http == HOST else self.reached
        scheme = "grpcs" if self.tls else "grpc"
        return f"http://{http}:{ports.http}", f"{scheme}://{self.reached}:{ports.grpc}"

    def flags(self, ports: Ports) -> list[str]:
        """Return the tritonserver flags for addresses, ports and TLS."""
        flags = [
            f"--http-address={self.http}",
            f"--http-port={ports.http}",
            f"--grpc-address={self.host}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-address={HOST}",
            f"--metrics-port={ports.metrics}",
        ]
        if self.tls is not None:
            flags += [
                "--grpc-use-ssl=1",
                f"--grpc-server-cert={self.tls.certificate.resolve()}",
                f"--grpc-server-key={self.tls.key.resolve()}",
            ]
            if self.tls.client_ca is not None:
                flags += [
                    "--grpc-use-ssl-mutual=1",
                    f"--grpc-root-cert={self.tls.client_ca.resolve()}",
                ]
        return flags

    def describe(self, ports: Ports, version: tuple[int, int]) -> list[str]:
        """Describe in sentences what other machines can reach; return an empty list on loopback."""
        if ipaddress.IPv4Address(self.host).is_loopback:
            return []
        http, grpc = f"http://{self.host}:{ports.http}", f"grpc://{self.host}:{ports.grpc}"
        if self.tls is None:
            reach = (
                f"{http} and {grpc}, unencrypted: others on the network can read and change "
                "requests."
            )
        else:
            reach = f"grpcs://{self.host}:{ports.grpc}; HTTP has no TLS and stays on loopback."
        access = "There is no authentication: everyone who reaches a port can use the models."
        if self.tls is not None and self.tls.client_ca is not None:
            access = f"Clients need a certificate from {self.tls.client_ca}; all have equal rights."
        return [
            f"Exposed beyond this machine: {reach}",
            access,
            f"The admin key protects {', '.join(ADMIN_APIS)}. Open: {', '.join(OPEN_APIS)}.",
            f"Metrics stay on {HOST}:{ports.metrics}.",
            f"This is tritonserver {'.'.join(map(str, version))} from 2024-10, which all later "
            "security bulletins affect. It is meant for demonstrations, tests and development on "
            "loopback; see SECURITY.md for a production setup.",
        ]


def choose_ports(http: int, grpc: int, metrics: int, exposure: Exposure | None = None) -> Ports:
    """Return the given ports, with 0 replaced by a free port.

    Raises:
        InputError: a port is out of range, or the host of `exposure` is not an address of this
            machine.
        ServerError: a port is not free.
    """
    exposure, chosen = exposure or Exposure(), []
    for port in (http, grpc, metrics):
        if not 0 <= port <= _MAX_PORT:
            raise InputError(
                f"expected a port from 1 to {_MAX_PORT}, or 0 for a free one, got {port}"
            )
    hosts = (exposure.http, exposure.host, HOST)
    with ExitStack() as held:  # all three at once, so that no port is chosen twice
        for host, port in zip(hosts, (http, grpc, metrics), strict=True):
            try:
                listener = held.enter_context(socket.create_server((host, port)))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise InputError(
                        f"{host} is not an address of this machine",
                        advice="give one of its addresses, or 0.0.0.0",
                    ) from error
                raise port_error(host, port, error.strerror or str(error)) from error
            chosen.append(listener.getsockname()[1])
    return Ports(*chosen)


def port_error(host: str, port: int, reason: str) -> ServerError:
    """Return the error for a port that Triton cannot listen on."""
    return ServerError(
        f"Triton cannot listen on {host}:{port}: {reason}",
        advice="stop the process that listens there, give another port, or give port 0 to choose a "
        "free one",
    )


def check_key(key: str) -> str:
    """Return `key` if it can serve as the administrative key.

    Raises:
        InputError: it is too short, or has characters that Triton's flag does not accept.
    """
    if not _KEY.fullmatch(key):
        raise InputError(
            "expected an administrative key of at least 16 letters, digits, - or _, got "
            f"{len(key)} characters",
            advice="create one with python -c 'import secrets; print(secrets.token_hex())'",
        )
    return key
