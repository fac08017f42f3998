"""What a worker's process needs: CPUs of its own, and a way past pictures that kill it."""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from serving.bulk.sources import Row
from serving.errors import InputError
from serving.util.machine import cpu_count

_DEATHS = 3
"""Workers that a shard may cost before the next goes through it picture by picture."""


def keep_to_cpus(count: int) -> list[socket.socket]:
    """Keep this process to `count` CPUs that no other worker on this machine keeps to.

    Ray counts CPUs but does not assign them. Runtimes take their number of threads from the CPUs a
    process may use, and OpenVINO pins its threads to the first ones: two workers left alone would
    share one CPU. A CPU is claimed by an abstract Unix socket, which is free again when the process
    ends, in whatever way.

    Returns:
        The claims; they hold as long as the sockets are open.
    """
    allowed = sorted(os.sched_getaffinity(0))
    claims: list[socket.socket] = []
    mine: list[int] = []
    for cpu in allowed:
        if len(mine) == min(count, len(allowed)):
            break
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0clip-deploy-cpu-{cpu}")
        except OSError:
            claim.close()
            continue
        claims.append(claim)
        mine.append(cpu)
    # Where others took too many, such as a second Ray on this machine, some must be shared.
    mine += [cpu for cpu in reversed(allowed) if cpu not in mine][: max(0, count - len(mine))]
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208  names only
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread), mine)
    cpu_count.cache_clear()
    return claims


class Attempts:
    """Finds pictures that kill the process, such as by a decoder's crash, and gets past them.

    Ray tries a shard again for ever. What was tried stands in a file beside the shard's. After
    `_DEATHS` tries its pictures are taken one by one, each named in the file before it is touched;
    one that was named twice at a death is given up.
    """

    def __init__(self, target: Path) -> None:
        self._file = target.with_name(f".{target.stem}.attempts")
        lines = self._file.read_text().split() if self._file.exists() else []
        self._tries = lines.count("try")
        suspects = [before for before, line in pairwise([*lines, "try"]) if line == "try"]
        self._given_up = {s for s in suspects if s != "try" and suspects.count(s) > 1}
        self._note("try")

    @property
    def careful(self) -> bool:
        """Whether to take pictures one by one."""
        return self._tries >= _DEATHS

    def watched(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, each noted before it is touched; those given up with that reason."""
        for index, (name, picture) in enumerate(rows):
            if str(index) in self._given_up:
                yield name, InputError("gave up: the process died of this picture, twice")
                continue
            self._note(str(index))
            yield name, picture

    def done(self) -> None:
        """Forget them."""
        self._file.unlink(missing_ok=True)

    def _note(self, what: str) -> None:
        with self._file.open("a") as file:
            file.write(f"{what}\n")
