"""`up`: runs the embedded server until it is stopped, and restarts it when it dies."""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from serving.cli.console import Json, document, note, result, table
from serving.cli.documents import Started
from serving.cli.options import (
    REPOSITORY,
    AdminKey,
    ClientCa,
    Host,
    TlsCert,
    TlsKey,
    server_tls,
)
from serving.errors import ServerError
from serving.triton.network import HOST, Ports
from serving.triton.repository import check_assembled
from serving.triton.server import EXIT_TIMEOUT_S, TritonServer

MOST_RESTARTS, WITHIN_S = 5, 600.0
"""A server that dies more often than that has a fault that starting it again does not mend."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Before a restart; doubled for each one within `WITHIN_S`."""
LOOK_S = 0.5
"""How often the server is looked at."""
PATIENCE_S = 5.0
"""For requests under way on a server of which a model died; what that model had never ends."""


def up(
    repository: Annotated[
        Path, typer.Argument(help="Model repository that `clip-deploy assemble` wrote.")
    ] = REPOSITORY,
    http_port: Annotated[int, typer.Option(help="Port of HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port of gRPC; 0 takes a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port of metrics; 0 takes a free one.")] = 8002,
    log_file: Annotated[
        Path | None, typer.Option("--log", help="Log file of Triton. Default: a temporary one.")
    ] = None,
    host: Host = HOST,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    client_ca: ClientCa = None,
    admin_key: AdminKey = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Restart the server when it, or the process of a model, dies; up to "
            f"{MOST_RESTARTS} times in {WITHIN_S / 60:g} minutes.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Start the embedded Triton server; `status --url` looks at a running one.

    Ctrl-C or SIGTERM stops it after the requests in flight. When it dies, or the process of one of
    its models, this command ends with an error, or restarts it with --restart.
    """
    check_assembled(repository)
    tls = server_tls(tls_cert, tls_key, client_ca)

    def server(ports: Ports) -> TritonServer:
        return TritonServer(
            repository,
            http_port=ports.http,
            grpc_port=ports.grpc,
            metrics_port=ports.metrics,
            log=log_file,
            host=host,
            tls=tls,
            admin_key=admin_key,
        )

    def started(running: TritonServer) -> None:
        for line in running.exposed:
            note(line, "yellow")
        facts = Started(
            http=running.http_url,
            grpc=running.grpc_url,
            metrics=f"http://{running.metrics_url}/metrics",
            log=str(running.log),
        )
        if as_json:
            document(facts)
            return
        title = f"Triton serves {repository}; Ctrl-C stops it"
        result(table(title, ("", ""), asdict(facts).items()))

    with _interrupted_by_signals():
        try:
            keep_up(server, Ports(http_port, grpc_port, metrics_port), started, restart)
        except KeyboardInterrupt:  # while the server is started, or not yet again
            note("stopped")


def keep_up(
    server: Callable[[Ports], TritonServer],
    ports: Ports,
    started: Callable[[TritonServer], None],
    restart: bool,
) -> None:
    """Run a server until a KeyboardInterrupt; with `restart` again when it died, on the same ports.

    Args:
        server: makes one for given ports.
        ports: of the first; 0 for any that is free.
        started: told once, when the first is ready.
        restart: else its death is an error.

    Raises:
        ServerError: it could not be started at first, it died, or it died too often.
    """
    restarts, again = Restarts(), False
    while True:
        try:
            with server(ports) as running:
                if again:
                    note(f"Triton serves again; its log is {running.log}")
                else:
                    started(running)
                ports, again = running.ports, True
                fault = _watched(running)
                if fault is None:
                    return
                running.stop(PATIENCE_S)
        except ServerError as error:
            if not again:
                raise
            fault = error.reason
        if not restart:
            raise ServerError(fault, advice="start it again, or give --restart")
        pause = restarts.pause(time.monotonic())
        if pause is None:
            raise ServerError(
                f"{fault}. That was once more than {MOST_RESTARTS} times in {WITHIN_S:g} s; it is "
                "not restarted",
                advice="look at its log",
            )
        note(
            f"{fault}. Starting again in {pause:g} s "
            f"({restarts.count} of {MOST_RESTARTS} times in {WITHIN_S:g} s)"
        )
        time.sleep(pause)


class Restarts:
    """How often a server was started again of late, and how long to wait before the next time."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    @property
    def count(self) -> int:
        """Restarts of the last `WITHIN_S` seconds, as of the last call of `pause`."""
        return len(self._times)

    def pause(self, now: float) -> float | None:
        """Seconds before the next restart, which is counted; None after too many."""
        while self._times and now - self._times[0] >= WITHIN_S:
            self._times.popleft()
        if len(self._times) == MOST_RESTARTS:
            return None
        self._times.append(now)
        return float(min(FIRST_PAUSE_S * 2 ** (len(self._times) - 1), LONGEST_PAUSE_S))


def _watched(server: TritonServer) -> str | None:
    """Wait for a fault of the server, or None when it is to stop."""
    try:
        while (fault := server.fault()) is None:
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        note(f"stopping; requests under way have up to {EXIT_TIMEOUT_S} s")
        return None
    return fault


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """The first SIGTERM or Ctrl-C is a KeyboardInterrupt, even of a shell's background job.

    Those after it change nothing: what is left to do is bounded.
    """
    signals = (signal.SIGTERM, signal.SIGINT)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(each, interrupt) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)
