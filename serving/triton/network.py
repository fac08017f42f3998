"""Where the embedded server listens, who can read it there, and what that opens.

By default everything listens on loopback. An operator who asks for another address is told what is
exposed (`Exposure.told`); SECURITY.md says what that is fit for.
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
"""What a key is needed for. Of the nine names that Triton knows (src/restricted_features.h; the
same for HTTP and gRPC, and in 2.51 as in 26.x) the others are what clients use: `OPEN_APIS`."""
OPEN_APIS = ("health", "metadata", "model-config", "inference")
_KEY = re.compile(r"[A-Za-z0-9_-]{16,}")


class Ports(NamedTuple):
    """The TCP ports of one server."""

    http: int
    grpc: int
    metrics: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """What a server shows over gRPC, and whom it asks to show something; PEM files.

    Triton reads them once, at its start: after a renewal it is to be started again.
    """

    certificate: Path
    """Its own, followed by those of the authorities between it and the root."""
    key: Path
    """Of the certificate, not encrypted."""
    client_ca: Path | None = None
    """Authorities that a client's certificate may come from; without, clients show none."""

    def check(self) -> None:
        """Read the files as a server would: Triton itself reports a bad one as a port in use.

        Raises:
            InputError: a file is missing, is no PEM, or the key is of another certificate.
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
    """The addresses that one server listens on.

    HTTP has no TLS in Triton. So where TLS is asked for, HTTP stays on loopback, whatever `host`
    is: nothing leaves this machine unencrypted, a proxy that ends TLS finds it there, and so does
    our own question whether the server is ready. Metrics stay on loopback always: whoever reads
    them learns which models are used how much.
    """

    host: str = HOST
    """An IPv4 address of this machine, or 0.0.0.0 for all of them."""
    tls: ServerTls | None = None

    @property
    def http(self) -> str:
        """The address of HTTP."""
        return HOST if self.tls else self.host

    @property
    def reached(self) -> str:
        """An address that clients on this machine find `host` at."""
        return HOST if self.host == "0.0.0.0" else self.host

    def check(self) -> None:
        """Look at what was asked for, before anything is started.

        Raises:
            InputError: `host` is no IPv4 address, or TLS files cannot be used.
        """
        try:
            ipaddress.IPv4Address(self.host)
        except ValueError as error:
            raise InputError(
                f"expected an IPv4 address to listen on, such as {HOST}, or 0.0.0.0 for all of "
                f"this machine, got {self.host!r}"
            ) from error
        if self.tls is not None:
            self.tls.check()

    def urls(self, ports: Ports) -> tuple[str, str]:
        """Of HTTP and of gRPC, for clients on this machine."""
        http = HOST if self.http == HOST else self.reached
        scheme = "grpcs" if self.tls else "grpc"
        return f"http://{http}:{ports.http}", f"{scheme}://{self.reached}:{ports.grpc}"

    def flags(self, ports: Ports) -> list[str]:
        """Tritonserver's: addresses, ports, TLS."""
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

    def told(self, ports: Ports, version: tuple[int, int]) -> list[str]:
        """What is open to other machines, a sentence each; nothing on loopback."""
        if ipaddress.IPv4Address(self.host).is_loopback:
            return []
        http, grpc = f"http://{self.host}:{ports.http}", f"grpc://{self.host}:{ports.grpc}"
        if self.tls is None:
            reach = f"{http} and {grpc}, unencrypted: anyone on the way reads and changes requests."
        else:
            reach = f"grpcs://{self.host}:{ports.grpc}; HTTP has no TLS and stays on loopback."
        asked = "There is no authentication: whoever reaches a port may use the models."
        if self.tls is not None and self.tls.client_ca is not None:
            asked = f"Clients show a certificate from {self.tls.client_ca}; all of them are equal."
        return [
            f"Exposed beyond this machine: {reach}",
            asked,
            f"Behind a key: {', '.join(ADMIN_APIS)}. Open: {', '.join(OPEN_APIS)}.",
            f"Metrics stay on {HOST}:{ports.metrics}.",
            f"This tritonserver is {'.'.join(map(str, version))}, of 2024-10: every security "
            "bulletin since touches it. It is for loopback, demonstrations, tests and development, "
            "not for this; see SECURITY.md for what production runs.",
        ]


def choose_ports(http: int, grpc: int, metrics: int, exposure: Exposure | None = None) -> Ports:
    """Check that three ports are free where `exposure` listens; 0 is replaced by a free one."""
    exposure, chosen = exposure or Exposure(), []
    hosts = (exposure.http, exposure.host, HOST)
    with ExitStack() as held:  # all at once, so that none is given twice
        for host, port in zip(hosts, (http, grpc, metrics), strict=True):
            try:
                listener = held.enter_context(socket.create_server((host, port)))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise InputError(
                        f"{host} is no address of this machine; give one of its own, or 0.0.0.0"
                    ) from error
                raise port_error(host, port, error.strerror or str(error)) from error
            chosen.append(listener.getsockname()[1])
    return Ports(*chosen)


def port_error(host: str, port: int, reason: str) -> ServerError:
    """Triton cannot have a port."""
    return ServerError(
        f"Triton cannot listen on {host}:{port}: {reason}. Stop what listens there, give another "
        "port, or give port 0 to take a free one"
    )


def check_key(key: str) -> str:
    """The key of the administrative APIs that an operator chose.

    Raises:
        InputError: it is short, or has characters that Triton's flag would not take.
    """
    if not _KEY.fullmatch(key):
        raise InputError(
            "expected an administrative key of at least 16 letters, digits, - or _, got "
            f"{len(key)} characters; python -c 'import secrets; print(secrets.token_hex())' makes "
            "one"
        )
    return key
