"""Command `up`, which runs the embedded server and optionally restarts it after a crash."""

import math
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

MAX_EARLY_ENDS, STABLE_S = 5, 60.0
"""The server is restarted until it has ended this often in a row within `STABLE_S` seconds of being
ready: it then has a fault that restarting does not fix. A server that ran for longer, and was ended
by a request, for example, is always restarted."""
FIRST_PAUSE_S, LONGEST_PAUSE_S, WITHIN_S = 1.0, 30.0, 600.0
"""Pause before a restart, which doubles with each restart within `WITHIN_S`, and its maximum."""
LOOK_S = 0.5
"""Interval between two checks of the server, in seconds."""
PATIENCE_S = 5.0
"""Seconds granted to requests in flight when a model has died. Its own requests never finish."""


def up(
    repository: Annotated[
        Path, typer.Argument(help="Model repository that `clip-deploy assemble` wrote.")
    ] = REPOSITORY,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="HTTP port; 0 selects a free one.")
    ] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="gRPC port; 0 selects a free one.")
    ] = 8001,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Metrics port; 0 selects a free one.")
    ] = 8002,
    log_file: Annotated[
        Path | None, typer.Option("--log", help="Log file of Triton. Default: a temporary file.")
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
            help="Restart the server when it or the process of a model dies, unless it has died "
            f"{MAX_EARLY_ENDS + 1} times in a row within {STABLE_S:g} s of its start.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the embedded Triton server; `status --url` shows the state of a running one.

    Ctrl-C or SIGTERM stops it after the requests in flight. If the server or the process of a model
    dies, this command exits with an error, or restarts the server with --restart.
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
        except KeyboardInterrupt:  # during a start, or the pause before a restart
            note("stopped")


def keep_up(
    server: Callable[[Ports], TritonServer],
    ports: Ports,
    started: Callable[[TritonServer], None],
    restart: bool,
) -> None:
    """Run a server until a KeyboardInterrupt.

    Args:
        server: creates a server with given ports.
        ports: ports of the first server; 0 selects a free one. Restarts use the same ports.
        started: called once, when the first server is ready.
        restart: restart the server when it dies, instead of raising an error.

    Raises:
        ServerError: the server did not start, died without `restart`, or died too often.
    """
    restarts, was_ready = Restarts(), False
    while True:
        ready_at = math.inf
        try:
            with server(ports) as running:
                ready_at = time.monotonic()
                if was_ready:
                    note(f"Triton is running again; its log is {running.log}")
                else:
                    started(running)
                ports, was_ready = running.ports, True
                fault = _watched(running)
                if fault is None:
                    return
                running.stop(PATIENCE_S)
        except ServerError as error:
            if not was_ready:
                raise
            fault = error.reason
        if not restart:
            raise ServerError(fault, advice="start the server again, or give --restart")
        now = time.monotonic()
        pause = restarts.pause(now, now - ready_at)
        if pause is None:
            raise ServerError(
                f"{fault}. The server is not restarted: it has ended {restarts.early} times in a "
                f"row within {STABLE_S:g} s of its start",
                advice="read its log",
            )
        note(
            f"{fault}. Restarting in {pause:g} s "
            f"(restart {restarts.count} within {WITHIN_S / 60:g} minutes)"
        )
        time.sleep(pause)


class Restarts:
    """Record of the ends of a server, which decides on the next restart."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self.early = 0
        """Number of ends in a row within `STABLE_S` seconds of the server being ready."""

    @property
    def count(self) -> int:
        """Number of restarts in the last `WITHIN_S` seconds, at the last call of `pause`."""
        return len(self._times)

    def pause(self, now: float, ran: float) -> float | None:
        """Count a restart and return the pause before it in seconds, or None for no restart.

        Args:
            now: the current time, in seconds.
            ran: seconds that the server was ready for; not positive if it never was.
        """
        self.early = 0 if ran >= STABLE_S else self.early + 1
        if self.early > MAX_EARLY_ENDS:
            return None
        while self._times and now - self._times[0] >= WITHIN_S:
            self._times.popleft()
        self._times.append(now)
        return float(min(FIRST_PAUSE_S * 2 ** (len(self._times) - 1), LONGEST_PAUSE_S))


def _watched(server: TritonServer) -> str | None:
    """Wait for a fault of the server and return it, or None after a KeyboardInterrupt."""
    try:
        while (fault := server.fault()) is None:
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        note(f"stopping; requests in flight have up to {EXIT_TIMEOUT_S} s")
        return None
    return fault


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGTERM or SIGINT, even in a shell's background job.

    Later signals are ignored, because stopping takes a bounded time.
    """
    signals = (signal.SIGTERM, signal.SIGINT)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = [signal.signal(number, interrupt) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
