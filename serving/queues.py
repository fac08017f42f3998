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
import os
import re
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache

METRICS = "CLIP_METRICS"
"""The environment variable with host and port of this server's metrics."""

LOOK_S = 0.02  # between looks at the metrics, at least; one takes 0.7 ms of an idle server
RARELY_S = 0.1  # between looks at a queue that was short
_BUSY_S = 0.1  # between two batches, at most, of a model that may have too much to do
_TIMEOUT_S = 1.0

Waiting = Callable[[str], int]


def waiting(model: str) -> int:
    """Requests that wait for `model`, by the server's metrics; none if those cannot be had."""
    address = os.environ.get(METRICS, "127.0.0.1:8002")
    reason = ""
    with closing(http.client.HTTPConnection(address, timeout=_TIMEOUT_S)) as connection:
        try:
            connection.request("GET", "/metrics")
            body = connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException) as error:
            body, reason = "", f": {error}"
    gauge = rf'^nv_inference_pending_request_count{{model="{model}".*}} (\d+)'
    if found := re.findall(gauge, body, re.MULTILINE):
        return sum(map(int, found))
    _warn(f"no metrics of {model} at {address}{reason}")
    return 0


@cache
def _warn(reason: str) -> None:
    import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

    pb_utils.Logger.log_warn(
        f"{reason}; its queue has no bound. Set {METRICS} to the host:port of this server's metrics"
    )


class Ahead:
    """The queue of a model that this one feeds.

    What passed since the last look counts as waiting still, so as long as little comes nobody
    looks, and the queue never has more than `limit` of ours.

    Args:
        model: the next one.
        limit: requests that may wait for it.
        feeders: processes like this one, which each let through their share.
        look: how many wait for a model.
    """

    def __init__(
        self, model: str, limit: int, *, feeders: int = 1, look: Waiting = waiting
    ) -> None:
        self._model, self._limit, self._feeders, self._look = model, limit, feeders, look
        self._known = self._passed = 0
        self._looked = -LOOK_S

    def room(self, count: int) -> int:
        """How many of `count` requests may go on; these are counted."""
        if count > self._left() and time.monotonic() - self._looked >= LOOK_S:
            self._known, self._passed = self._look(self._model), 0
            self._looked = time.monotonic()
        taken = max(0, min(count, self._left()))
        self._passed += taken
        return taken

    def _left(self) -> int:
        return -((self._known - self._limit) // self._feeders) - self._passed


class Behind:
    """The queue of this model, which shows when the model takes from it.

    Args:
        model: this one.
        limit: requests that may wait for it, beside those that come between two looks.
        look: how many wait for a model.
    """

    def __init__(self, model: str, limit: int, *, look: Waiting = waiting) -> None:
        self._model, self._limit, self._look = model, limit, look
        self._excess = 0
        self._look_at, self._ended = 0.0, -_BUSY_S

    def excess(self, count: int) -> int:
        """How many of `count` requests, which were taken now, are to be refused."""
        now = time.monotonic()
        if now - self._ended < _BUSY_S and now >= self._look_at:
            found = self._look(self._model)
            self._excess = max(0, found - self._limit)
            self._look_at = time.monotonic() + (LOOK_S if 2 * found > self._limit else RARELY_S)
        refused = min(count, self._excess)
        self._excess -= refused
        return refused

    def done(self) -> None:
        """Every request that was taken has its answer."""
        self._ended = time.monotonic()
