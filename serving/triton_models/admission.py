"""Admission control: rejects requests once the queue of a Triton model is full.

Triton can bound a queue itself (`max_queue_size`), but it disables prefetching for every queue that
has a bound or a timeout. A new request then wakes the batcher only if an instance is waiting at
that moment (`PayloadSlotAvailable`), and nothing wakes it when an instance becomes free. A request
that arrives while every instance is busy waits until the next request arrives, or for half a
second. In addition, the count is not corrected when Triton merges payloads (server issue 8870).

Therefore only the queue of `image_preprocess` has a bound in Triton. The other queues are bounded
by the Python models, which read the queue lengths from the server's metrics.

If the metrics cannot be read, this module imports `triton_python_backend_utils`, which exists only
in Triton's Python stub, to log a warning.
"""

import http.client
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import closing

METRICS = "CLIP_METRICS"
"""Name of the environment variable with the host:port of this server's metrics."""

# Intervals between reads of the metrics. A read takes 0.7 ms on an idle server.
LOOK_S = 0.02  # while the queue is full, or more than half full
SHORT_S = 0.1  # while the queue is short
IDLE_S = 1.0  # while the model seems idle
BLIND_S = 10.0  # after a failed read
_BUSY_S = 0.1  # a model with a longer pause between two batches counts as idle
_TIMEOUT_S = 0.5

Waiting = Callable[[str], int]


class Metrics:
    """Reader of the queue lengths in this server's metrics.

    Args:
        address: host:port. By default, the value of the environment variable that `METRICS` names,
            or 127.0.0.1:8002 if it is not set.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address or os.environ.get(METRICS, "127.0.0.1:8002")
        self._blind_until = 0.0
        self._warned = False

    def waiting(self, model: str) -> int:
        """Return the number of requests that wait for `model`.

        If the metrics cannot be read, log one warning and return 0.
        """
        if time.monotonic() < self._blind_until:
            return 0
        try:
            body = self._read()
            gauge = rf'^nv_inference_pending_request_count{{model="{model}".*}} (\d+)'
            found = re.findall(gauge, body, re.MULTILINE)
            if not found:
                raise ValueError(f"no queue length of {model}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._blind_until = time.monotonic() + BLIND_S
            self._warn(model, error)
            return 0
        return sum(map(int, found))

    def _read(self) -> str:
        connection = http.client.HTTPConnection(self._address, timeout=_TIMEOUT_S)
        with closing(connection):
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"HTTP status {response.status}")
            return response.read().decode(errors="replace")

    def _warn(self, model: str, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        import triton_python_backend_utils as pb_utils

        pb_utils.Logger.log_warn(
            f"the metrics at {self._address} cannot be read ({error}), so the queue of {model} is "
            f"not bounded; set {METRICS} to the host:port of this server's metrics"
        )


class Ahead:
    """Admission to the queue of the next model, to which this model sends its requests.

    Requests that were admitted since the last read of the metrics count as still waiting. The
    metrics are read only when this count reaches the limit, which is rare under low load. At most
    `limit` requests wait. With several feeders, each may exceed the limit by its share in the worst
    case.

    Args:
        model: name of the next model.
        limit: maximum number of requests that wait for it.
        feeders: number of processes that send requests to it; each admits its share.
        look: returns the number of requests that wait for a model.
    """

    def __init__(
        self, model: str, limit: int, *, feeders: int = 1, look: Waiting | None = None
    ) -> None:
        self._model, self._limit, self._feeders = model, limit, feeders
        self._look = look or Metrics().waiting
        self._known = self._passed = 0
        self._look_at = 0.0

    def room(self, count: int) -> int:
        """Return how many of `count` requests are admitted, and count them as waiting."""
        if count > self._left() and time.monotonic() >= self._look_at:
            self._known, self._passed = self._look(self._model), 0
            pause = LOOK_S if self._known >= self._limit else 0.0
            self._look_at = time.monotonic() + pause
        admitted = max(0, min(count, self._left()))
        self._passed += admitted
        return admitted

    def _left(self) -> int:
        return -((self._known - self._limit) // self._feeders) - self._passed


class Behind:
    """Admission to the queue of this model, checked when the model takes requests from it.

    If more than `limit` requests wait, the excess over seven eighths of `limit` is rejected. The
    remaining eighth leaves room for the model that feeds this one through `Ahead`, even while other
    clients call this model directly.

    Args:
        model: name of this model.
        limit: maximum number of requests that wait for it. Requests that arrive between two reads
            of the metrics may exceed it.
        look: returns the number of requests that wait for a model.
    """

    def __init__(self, model: str, limit: int, *, look: Waiting | None = None) -> None:
        self._model, self._limit = model, limit
        self._look = look or Metrics().waiting
        self._excess = 0
        self._looked, self._look_at, self._ended = time.monotonic(), 0.0, -math.inf

    def excess(self, count: int) -> int:
        """Return how many of the `count` requests just taken from the queue must be rejected."""
        now = time.monotonic()
        busy = now - self._ended < _BUSY_S
        if (busy and now >= self._look_at) or now - self._looked >= IDLE_S:
            waiting = self._look(self._model)
            kept = self._limit - self._limit // 8
            self._excess = waiting - kept if waiting > self._limit else 0
            self._looked = time.monotonic()
            self._look_at = self._looked + (LOOK_S if 2 * waiting > self._limit else SHORT_S)
        elif not busy:
            self._excess = 0  # the excess requests left the queue, for example canceled by clients
        rejected = min(count, self._excess)
        self._excess -= rejected
        return rejected

    def done(self) -> None:
        """Record that all requests taken from the queue were answered."""
        self._ended = time.monotonic()
