"""What a running Triton server's processes do, seen from outside in /proc.

Which of those that run Python models died: Triton (2.51) does not start one again, and does not
tell: `/v2/health/ready` and the model's own `ready` stay 200, and every request to it fails after a
second (measured; issue 8604 of triton-inference-server/server: restarts were taken out in 24.06).

Whether the server computes anything: Triton counts the requests that wait and those that are done,
but not those that it is at.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

IDLE_S, IDLE_SHARE = 0.75, 0.04
"""Without a request the processes take less than this share of one CPU; seen over this long."""
_LOOK_S = 0.05
_PROCESSES = Path("/proc")
_PROGRAM = "triton_python_backend_stub"


@dataclass(frozen=True, slots=True)
class Stub:
    """A process of a Python model; a model has one an instance."""

    pid: int
    model: str


@dataclass(frozen=True, slots=True)
class _Status:
    """Of a process that has not ended."""

    parent: int
    group: int
    cpu_s: float


def stubs_of(server: int) -> tuple[Stub, ...]:
    """Those that tritonserver, a pid, has started and that live."""
    found = []
    for pid, status in _processes():
        if status.parent != server:
            continue
        try:
            line = (_PROCESSES / str(pid) / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        program, *arguments = os.fsdecode(line).split("\0")
        paths = [Path(argument) for argument in arguments if argument.endswith("/model.py")]
        if Path(program).name == _PROGRAM and paths:
            found.append(Stub(pid, paths[0].parents[1].name))
    return tuple(found)


def is_alive(stub: Stub, server: int) -> bool:
    """Whether the process is still there, as a child of tritonserver and not as a zombie."""
    status = _status(stub.pid)
    return status is not None and status.parent == server


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie."""
    return _status(pid) is None


def wait_until_idle(group: int, seconds: float, ended: Callable[[], bool]) -> bool:
    """Wait until the processes of a group do nothing worth the name; False if not in `seconds`.

    Args:
        group: the process group's number.
        ended: asked now and then; when it says so, there is nothing to wait for.
    """
    end = time.monotonic() + seconds
    samples: deque[tuple[float, float]] = deque()
    while not ended():
        now = time.monotonic()
        samples.append((now, sum(s.cpu_s for _, s in _processes() if s.group == group)))
        while len(samples) > 2 and now - samples[1][0] >= IDLE_S:
            samples.popleft()
        (since, before), (_, used) = samples[0], samples[-1]
        if now - since >= IDLE_S and used - before < IDLE_SHARE * (now - since):
            return True
        if now >= end:
            return False
        time.sleep(_LOOK_S)
    return True


def _processes() -> Iterator[tuple[int, _Status]]:
    for path in _PROCESSES.glob("[0-9]*"):
        status = _status(int(path.name))
        if status is not None:
            yield int(path.name), status


def _status(pid: int) -> _Status | None:
    """None of a process that ended, be it waited for or not. Fields: proc_pid_stat(5)."""
    try:
        text = (_PROCESSES / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # after the name, which may hold anything
    if fields[0] in "ZX":
        return None
    ticks = int(fields[11]) + int(fields[12])  # in user and in system mode
    return _Status(int(fields[1]), int(fields[2]), ticks / os.sysconf("SC_CLK_TCK"))
