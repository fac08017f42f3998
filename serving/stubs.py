"""The processes that run a Triton server's Python models, and which of them died.

Triton (2.51) does not start one again, and does not tell: `/v2/health/ready` stays 200 and every
request to the model fails (triton-inference-server/server issue 8604; restarting was taken out with
24.06). So they are looked for from outside, in /proc.
"""

from dataclasses import dataclass
from pathlib import Path

_PROCESSES = Path("/proc")
_PROGRAM = "triton_python_backend_stub"


@dataclass(frozen=True, slots=True)
class Stub:
    """A process of a Python model; a model has one an instance."""

    pid: int
    model: str


def stubs_of(server: int) -> tuple[Stub, ...]:
    """Those that tritonserver, a pid, has started and that live."""
    found = []
    for process in _PROCESSES.glob("[0-9]*"):
        pid = int(process.name)
        if _parent(pid) != server:
            continue
        try:
            program, *arguments = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it ended meanwhile
            continue
        paths = [Path(argument) for argument in arguments if argument.endswith("/model.py")]
        if Path(program).name == _PROGRAM and paths:
            found.append(Stub(pid, paths[0].parents[1].name))
    return tuple(sorted(found, key=lambda stub: stub.pid))


def is_alive(stub: Stub, server: int) -> bool:
    """Whether the process is still there, as a child of tritonserver and not as a zombie."""
    return _parent(stub.pid) == server


def _parent(pid: int) -> int | None:
    """The parent of a process; None of one that ended, be it waited for or not."""
    try:
        text = (_PROCESSES / str(pid) / "stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]  # after the name, which may hold spaces
    return None if state in "ZX" else int(parent)
