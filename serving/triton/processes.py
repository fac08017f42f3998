"""Monitoring of the processes of a running Triton server.

Crashed Python models: Triton (2.51) neither restarts nor reports them. `/v2/health/ready` and the
model's own `ready` still return 200, and every request to the model fails after one second
(measured; restarts were removed in 24.06, triton-inference-server/server issue 8604).

Idleness: Triton counts waiting and finished requests, but not those that it is computing.
`wait_until_idle` therefore observes the CPU time of the server's processes.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

IDLE_S, IDLE_SHARE = 0.75, 0.04
"""A server counts as idle when its processes use less than `IDLE_SHARE` of one CPU over `IDLE_S`
seconds."""
_LOOK_S = 0.05
_PROGRAM = "triton_python_backend_stub"


@dataclass(frozen=True, slots=True)
class Stub:
    """Process of a Python model; a model has one per instance."""

    process: psutil.Process
    model: str

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def is_alive(self) -> bool:
        """Return whether the process runs: it has not ended, is no zombie, its id is not reused."""
        return _runs(self.process)


def stubs_of(server: int) -> tuple[Stub, ...]:
    """Return the running Python-model processes of the tritonserver with process id `server`."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(server).children():
            with suppress(psutil.NoSuchProcess):
                if model := _model_of(process.cmdline()):
                    found.append(Stub(process, model))
    return tuple(found)


def has_ended(pid: int) -> bool:
    """Return whether process `pid` is gone, or a zombie."""
    try:
        return not _runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def wait_until_idle(server: int, seconds: float, ended: Callable[[], bool]) -> bool:
    """Wait until a server and its child processes use almost no CPU time.

    Args:
        server: process id of tritonserver.
        seconds: maximum time to wait.
        ended: polled meanwhile; waiting stops once it returns True.

    Returns:
        Whether the server became idle, or ended, within `seconds`.
    """
    end = time.monotonic() + seconds
    samples: deque[tuple[float, float]] = deque()
    while not ended():
        now = time.monotonic()
        samples.append((now, _cpu_seconds(server)))
        while len(samples) > 2 and now - samples[1][0] >= IDLE_S:
            samples.popleft()
        (since, before), (_, used) = samples[0], samples[-1]
        if now - since >= IDLE_S and used - before < IDLE_SHARE * (now - since):
            return True
        if now >= end:
            return False
        time.sleep(_LOOK_S)
    return True


def _model_of(command: list[str]) -> str | None:
    """Return the model that a stub runs: `stub …/<model>/<version>/model.py …`."""
    if not command or Path(command[0]).name != _PROGRAM:
        return None
    paths = [Path(argument) for argument in command[1:] if argument.endswith("/model.py")]
    return paths[0].parents[1].name if paths else None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (
            psutil.STATUS_ZOMBIE,
            psutil.STATUS_DEAD,
        )
    except psutil.NoSuchProcess:
        return False


def _cpu_seconds(server: int) -> float:
    """Return the user and system CPU time of the server and its child processes, in seconds."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(server)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
    return total
