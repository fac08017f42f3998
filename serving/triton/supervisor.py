"""Supervisor process between `server.py` and Triton: runs a command and cleans up after it.

    python -I -S supervisor.py PARENT GRACE_S SCRATCH SHM_PREFIX COMMAND...

The supervisor runs COMMAND in its own process group, prints the command's process id as the only
line on stdout, and redirects the command's stdout and stderr to its own stderr. It ends the whole
group when the command exits, when it receives SIGTERM, SIGINT or SIGHUP, or when the process PARENT
is gone. The command has GRACE_S seconds to exit; a second signal kills it at once. Finally the
supervisor removes the directory SCRATCH and the shared memory SHM_PREFIX*, and exits with the
command's status.

The command gets a stack of `STACK_BYTES`, which its threads inherit. Triton (2.51) keeps parts of
HTTP requests on the stack: with the usual 8 MiB, a body of 5 MB with curl's default content type
ends it.

A separate process is needed because a parent killed by SIGKILL cannot clean up. The supervisor
polls getppid() because the alternatives fail: PR_SET_PDEATHSIG fires when the *thread* that started
the supervisor ends, and a pipe held by the parent stays open in every child that it forked. Between
the supervisor, which has one thread, and the command, PR_SET_PDEATHSIG is reliable, so that even
SIGKILL of the supervisor ends the command.

This file uses the standard library only: it runs without site-packages and starts in a few
hundredths of a second. Like Triton, it requires Linux.
"""

import ctypes
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
STACK_BYTES = 512 << 20
"""Enough for HTTP bodies of 128 MB. Only pages that are used take up memory."""
STRICT_STACK_BYTES = 64 << 20
"""Used where address space itself is limited."""
LOADING_S = 60.0  # maximum time until Triton has loaded its Python backend
LOOK_S = 0.5  # interval between checks that the parent is alive
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_LIBC = ctypes.CDLL(None)


def _prepare() -> None:
    """Prepare the command between fork and exec.

    It dies with the supervisor, receives all signals, and has a large stack.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _stack_bytes() if hard == resource.RLIM_INFINITY else min(_stack_bytes(), hard)
    # Without a limit, the threads of glibc have 2 MiB.
    if soft == resource.RLIM_INFINITY or soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def _stack_bytes() -> int:
    """Return the stack size, which every thread reserves in the address space."""
    strict = False
    with suppress(OSError):
        strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return STRICT_STACK_BYTES if strict or limited else STACK_BYTES


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # A subreaper inherits its orphaned descendants, so it can wait for the whole group.
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS | {signal.SIGCHLD})
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        process_group=0,
        preexec_fn=_prepare,
    )


def _wait(child: subprocess.Popen[bytes], parent: int, grace: float) -> None:
    """Wait until `child` has exited, and terminate it when a stop is requested.

    A stop is requested by a stop signal, or by the end of the parent. Return at the latest `grace`
    seconds after the request, or at a second signal.
    """
    end = math.inf
    while child.poll() is None and time.monotonic() < end:
        received = signal.sigtimedwait(STOP_SIGNALS | {signal.SIGCHLD}, LOOK_S)
        signaled = received is not None and received.si_signo in STOP_SIGNALS
        if signaled and end < math.inf:
            return
        if end == math.inf and (signaled or os.getppid() != parent):
            child.terminate()
            end = time.monotonic() + grace


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill the remaining processes of the child's group and wait until they are gone."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    with suppress(ChildProcessError):  # no member left
        while True:
            os.waitpid(-child.pid, 0)


def _environments() -> dict[Path, float]:
    """Return the directories that Python backends created for environments, with their times.

    Triton (2.51) creates one at each start, always in /tmp, and removes it only if it ends by
    itself. Models of this project do not use it, so it stays empty.
    """
    found = {}
    for path in Path("/tmp").glob("python_env_??????"):
        with suppress(OSError):
            if (status := path.stat()).st_uid == os.getuid():
                found[path] = status.st_mtime
    return found


def main(arguments: list[str]) -> int:
    """Supervise one command; see the module's docstring for the arguments."""
    parent, grace, scratch, shm_prefix, *command = arguments
    began, before = time.time(), _environments()
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
        for path, created in _environments().items():
            if path not in before and created - began < LOADING_S:
                with suppress(OSError):  # not empty: in use by another Triton server
                    path.rmdir()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
