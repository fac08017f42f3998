"""Isolation of worker processes: exclusive CPUs, and recovery from images that crash a worker."""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from serving.bulk.sources import Row
from serving.errors import InputError
from serving.util.machine import cpu_count

_CLAIM = "clip-deploy-cpu-"
"""Name of the abstract socket that claims a CPU, without its number."""
_MAX_CRASHES = 3
"""Crashes of workers on a shard after which its images are embedded one by one."""


def keep_to_cpus(count: int) -> list[socket.socket]:
    """Restrict this process to `count` CPUs that no other worker on this machine uses.

    Ray counts CPUs but does not assign them. Runtimes derive their number of threads from the CPUs
    that a process may use, and OpenVINO pins its threads to the first of them, so that two
    unrestricted workers would share one CPU. A CPU is claimed by binding an abstract Unix socket,
    which the kernel releases whenever the process ends.

    Returns:
        The sockets, which hold the claims as long as they are open.
    """
    allowed = sorted(os.sched_getaffinity(0))
    claims: list[socket.socket] = []
    mine: list[int] = []
    for cpu in allowed:
        if len(mine) == min(count, len(allowed)):
            break
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0{_CLAIM}{cpu}")
        except OSError:
            claim.close()
            continue
        claims.append(claim)
        mine.append(cpu)
    # If other processes, such as another Ray, have claimed too many CPUs, share some of them.
    mine += [cpu for cpu in reversed(allowed) if cpu not in mine][: max(0, count - len(mine))]
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208  names only
        with suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(thread), mine)
    cpu_count.cache_clear()
    return claims


class Attempts:
    """Record of the attempts to embed a shard, which finds and skips images that crash the process.

    Ray retries a shard forever. A file beside the shard records each attempt. After `_MAX_CRASHES`
    attempts the images are processed one by one, and each is recorded before it is decoded. An
    image that was the last one recorded in two crashes is skipped.
    """

    def __init__(self, target: Path) -> None:
        self._file = target.with_name(f".{target.stem}.attempts")
        lines = self._file.read_text().split() if self._file.exists() else []
        self._attempts = lines.count("try")
        suspects = [before for before, line in pairwise([*lines, "try"]) if line == "try"]
        self._skipped = {s for s in suspects if s != "try" and suspects.count(s) > 1}
        self._record("try")

    @property
    def careful(self) -> bool:
        """True if the images are to be processed one by one."""
        return self._attempts >= _MAX_CRASHES

    def watched(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows, recording each before it is processed; skipped images become errors."""
        for index, (name, image) in enumerate(rows):
            if str(index) in self._skipped:
                yield name, InputError("skipped: this image crashed the process twice")
                continue
            self._record(str(index))
            yield name, image

    def done(self) -> None:
        """Delete the record."""
        self._file.unlink(missing_ok=True)

    def _record(self, entry: str) -> None:
        with self._file.open("a") as file:
            file.write(f"{entry}\n")
