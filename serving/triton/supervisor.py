"""Runs one command and lets nothing of it survive: the process between `server.py` and Triton.

    python -I -S supervisor.py PARENT GRACE_S SCRATCH SHM_PREFIX COMMAND...

It knows nothing of Triton. It runs COMMAND in a process group of its own, prints the command's pid
as its only line on stdout, gives its stderr to the command's stdout and stderr, and ends the whole
group when the command exits, when it is told to (SIGTERM, SIGINT, SIGHUP), or when the process
PARENT is gone; the command has GRACE_S to exit by itself, unless we are told twice. Then it removes
the directory SCRATCH and the shared memory SHM_PREFIX*, and exits with the command's status.

Why a process of its own: a parent that got `kill -9` cleans nothing up. Asking the kernel for a
signal on the parent's death (PR_SET_PDEATHSIG) would fire when the *thread* that started us ends,
and a pipe held by the parent stays open in every child that it forked. Looking at getppid() has
neither flaw. Between us and the command PR_SET_PDEATHSIG is sound, since we have one thread; so
even `kill -9` of the supervisor ends the command.

Standard library only: it runs without site-packages, so that it starts in a few hundredths of a
second. Linux only, as Triton is.
"""

import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
LOOK_S = 0.5  # how often we look whether the parent is still there
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_LIBC = ctypes.CDLL(None)


def _die_with_supervisor() -> None:
    """Between fork and exec of the command: die with us, and receive signals that we block."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # A subreaper inherits its orphaned descendants, so we can wait for all of the group.
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS | {signal.SIGCHLD})
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        process_group=0,
        preexec_fn=_die_with_supervisor,
    )


def _wait(child: subprocess.Popen[bytes], parent: int, grace: float) -> None:
    """Return when `child` has exited, or `grace` seconds after it was asked to, at most.

    It is asked to when we are told to stop, or the parent is gone. Told a second time, return.
    """
    end = math.inf
    while child.poll() is None and time.monotonic() < end:
        received = signal.sigtimedwait(STOP_SIGNALS | {signal.SIGCHLD}, LOOK_S)
        told = received is not None and received.si_signo in STOP_SIGNALS
        if told and end < math.inf:
            return
        if end == math.inf and (told or os.getppid() != parent):
            child.terminate()
            end = time.monotonic() + grace


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the child's process group and wait until it is gone."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    with suppress(ChildProcessError):  # no member left
        while True:
            os.waitpid(-child.pid, 0)


def main(arguments: list[str]) -> int:
    """Supervise one command; see the module's docstring for the arguments."""
    parent, grace, scratch, shm_prefix, *command = arguments
    try:
        child = _start(command)
        try:
            print(child.pid, flush=True)
            _wait(child, int(parent), float(grace))
        finally:
            _kill_group(child)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for region in SHARED_MEMORY.glob(f"{shm_prefix}*"):
            region.unlink(missing_ok=True)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
