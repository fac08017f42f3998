"""What is too much for the queues of a Triton server.

Triton bounds a queue itself (`max_queue_size`), but one that has a bound, or a timeout, is served
differently: a request that comes while the model is at work is noticed when the next one comes, or
half a second later (without prefetching, `PayloadSlotAvailable` asks whether an instance waits, and
nobody tells when it does), and what payloads merge is never made good (server issue 8870). So the
queues have no bound of their own, and the Python models that requests pass count instead, from the
server's metrics.

Needs `triton_python_backend_utils`, which only Triton's Python stub has, where metrics are not to
be had.
"""

import http.client
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import closing

METRICS = "CLIP_METRICS"
"""The environment variable with host and port of this server's metrics."""

LOOK_S = 0.02  # between looks at a queue that was full; one takes 0.7 ms of an idle server
SHORT_S = 0.1  # at a queue that was short
IDLE_S = 1.0  # at the queue of a model that seems idle
BLIND_S = 10.0  # after a look in vain
_BUSY_S = 0.1  # between two batches, at most, of a model that may have too much to do
_TIMEOUT_S = 0.5

Waiting = Callable[[str], int]


class Metrics:
    """The metrics of this server, of which one gauge is read.

    Args:
        address: host:port; default: what the environment variable METRICS says, or Triton's own.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address or os.environ.get(METRICS, "127.0.0.1:8002")
        self._blind_until = 0.0
        self._told = False

    def waiting(self, model: str) -> int:
        """Requests that wait for `model`; none, and a line in the log, if that cannot be known."""
        if time.monotonic() < self._blind_until:
            return 0
        try:
            body = self._read()
            gauge = rf'^nv_inference_pending_request_count{{model="{model}".*}} (\d+)'
            found = re.findall(gauge, body, re.MULTILINE)
            if not found:
                raise ValueError(f"tell nothing of {model}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._blind_until = time.monotonic() + BLIND_S
            self._tell(model, error)
            return 0
        return sum(map(int, found))

    def _read(self) -> str:
        connection = http.client.HTTPConnection(self._address, timeout=_TIMEOUT_S)
        with closing(connection):
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"answer with status {response.status}")
            return response.read().decode(errors="replace")

    def _tell(self, model: str, error: Exception) -> None:
        if self._told:
            return
        self._told = True
        import triton_python_backend_utils as pb_utils

        pb_utils.Logger.log_warn(
            f"the metrics at {self._address} cannot be read ({error}), so the queue of {model} has "
            f"no bound; set {METRICS} to the host:port of this server's metrics"
        )


class Ahead:
    """The queue of a model that this one feeds.

    What passed since the last look counts as waiting still, so as long as little comes nobody
    looks, and the queue has no more than `limit` of ours: of each feeder, in the worst case its
    share more.

    Args:
        model: the next one.
        limit: requests that may wait for it.
        feeders: processes like this one, which each let through their share.
        look: how many wait for a model.
    """

    def __init__(
        self, model: str, limit: int, *, feeders: int = 1, look: Waiting | None = None
    ) -> None:
        self._model, self._limit, self._feeders = model, limit, feeders
        self._look = look or Metrics().waiting
        self._known = self._passed = 0
        self._look_at = 0.0

    def room(self, count: int) -> int:
        """How many of `count` requests may go on; these are counted."""
        if count > self._left() and time.monotonic() >= self._look_at:
            self._known, self._passed = self._look(self._model), 0
            pause = LOOK_S if self._known >= self._limit else 0.0
            self._look_at = time.monotonic() + pause
        taken = max(0, min(count, self._left()))
        self._passed += taken
        return taken

    def _left(self) -> int:
        return -((self._known - self._limit) // self._feeders) - self._passed


class Behind:
    """The queue of this model, which shows when the model takes from it.

    Where it is too long it is cut to an eighth less than `limit`: the model that feeds this one
    through `Ahead` finds room then, also while others ask this one past it.

    Args:
        model: this one.
        limit: requests that may wait for it, beside those that come between two looks.
        look: how many wait for a model.
    """

    def __init__(self, model: str, limit: int, *, look: Waiting | None = None) -> None:
        self._model, self._limit = model, limit
        self._look = look or Metrics().waiting
        self._excess = 0
        self._looked, self._look_at, self._ended = time.monotonic(), 0.0, -math.inf

    def excess(self, count: int) -> int:
        """How many of `count` requests, which were taken now, are to be refused."""
        now = time.monotonic()
        busy = now - self._ended < _BUSY_S
        if (busy and now >= self._look_at) or now - self._looked >= IDLE_S:
            found = self._look(self._model)
            kept = self._limit - self._limit // 8
            self._excess = found - kept if found > self._limit else 0
            self._looked = time.monotonic()
            self._look_at = self._looked + (LOOK_S if 2 * found > self._limit else SHORT_S)
        elif not busy:
            self._excess = 0  # those that were too many went elsewhere: given up on, say
        refused = min(count, self._excess)
        self._excess -= refused
        return refused

    def done(self) -> None:
        """Every request that was taken has its answer."""
        self._ended = time.monotonic()
