"""Asyncio load generator for Triton, independent of perf_analyzer.

It sends requests through `tritonclient.grpc.aio` or `tritonclient.http.aio`, from one process.
Failed requests are counted, and the load continues.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tritonclient.utils import InferenceServerException

from benchmarks.load.workload import WINDOWS, Load, Measured, steady
from serving.errors import ServerError
from serving.util.machine import cpu_count

_RAMP = 0.5
"""Time before the first window, as a share of a window, in which the server's queues fill."""

Send = Callable[[int], Awaitable[object]]
"""Sends the item with the given index, and waits for the response."""


@dataclass(slots=True)
class _Log:
    """Outcomes of the requests."""

    ends: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    errors: int = 0
    last_error: str = ""

    async def record(self, send: Send, index: int, start: float) -> None:
        """Send a request and record it; latency counts from `start` (`time.perf_counter`)."""
        try:
            await send(index)
        except (InferenceServerException, OSError, TimeoutError) as error:
            self.errors += 1
            self.last_error = str(error)
            return
        end = time.perf_counter()
        self.ends.append(end)
        self.latencies.append(end - start)


class AsyncClient:
    """Load generator; `timeout` is the maximum duration of a request, in seconds."""

    name: Literal["asyncio"] = "asyncio"

    def __init__(self, timeout: float = 30.0) -> None:
        self._timeout = timeout

    def measure(self, load: Load) -> Measured:
        """Measure throughput and latency of the responses within WINDOWS windows.

        In rate mode, latency counts from the scheduled time of a request, so that delays of the
        client itself are not hidden.

        Raises:
            ServerError: no request was answered.
        """
        return asyncio.run(self._measure(load))

    async def _measure(self, load: Load) -> Measured:
        log = _Log()
        async with _connection(load, self._timeout) as connection:
            send = _sender(load, connection, self._timeout)
            begin = time.perf_counter() + _RAMP * load.window_s
            end = begin + WINDOWS * load.window_s
            cpu, start = time.process_time(), time.perf_counter()
            await (_closed if load.mode == "concurrency" else _open)(send, load.load, end, log)
            cpu_share = (time.process_time() - cpu) / (time.perf_counter() - start) / cpu_count()
        return _measured(log, begin, load.window_s, cpu_share)


async def _closed(send: Send, concurrency: float, end: float, log: _Log) -> None:
    """Keep `concurrency` requests in flight until `end`."""
    indices = itertools.count()

    async def send_in_sequence() -> None:
        while (now := time.perf_counter()) < end:
            await log.record(send, next(indices), now)

    await asyncio.gather(*(send_in_sequence() for _ in range(int(concurrency))))


async def _open(send: Send, rate: float, end: float, log: _Log) -> None:
    """Start `rate` requests/s at random times until `end`, however many are in flight."""
    rng = random.Random(0)
    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for index in itertools.count():
            due += rng.expovariate(rate)
            if due >= end:
                return
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(log.record(send, index, due))


def _measured(log: _Log, begin: float, window_s: float, cpu_share: float) -> Measured:
    ends, latencies = np.array(log.ends), np.array(log.latencies) * 1e3
    numbers = np.floor((ends - begin) / window_s)
    windows = [latencies[numbers == number] for number in range(WINDOWS)]
    counted = np.concatenate(windows)
    if not len(counted):
        why = (
            f"{log.errors} failed, the last one with: {log.last_error}"
            if log.errors
            else "none completed"
        )
        raise ServerError(
            f"no request was answered within {WINDOWS} windows of {window_s:g} s ({why})",
            advice="check the server's log, or use longer windows",
        )
    p50, p95, p99 = (float(value) for value in np.percentile(counted, (50, 95, 99)))
    return Measured(
        throughput_per_s=len(counted) / (WINDOWS * window_s),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        errors=log.errors,
        stable=all(map(len, windows))
        and steady([len(window) for window in windows], [window.mean() for window in windows]),
        cpu_share=cpu_share,
    )


def _connection(load: Load, timeout: float) -> Any:
    if load.wire == "grpc":
        import tritonclient.grpc.aio

        return tritonclient.grpc.aio.InferenceServerClient(load.address)
    import tritonclient.http.aio

    # No limit in rate mode: waiting for a connection would count as time of the server.
    limit = int(load.load) if load.mode == "concurrency" else 0
    return tritonclient.http.aio.InferenceServerClient(
        load.address, conn_limit=limit, conn_timeout=timeout
    )


def _sender(load: Load, connection: Any, timeout: float) -> Send:
    inputs = [_tensor(load, item) for item in load.workload.items]
    options = {"client_timeout": timeout} if load.wire == "grpc" else {}
    model = load.workload.model

    async def send(index: int) -> object:
        return await connection.infer(model, [inputs[index % len(inputs)]], **options)

    return send


def _tensor(load: Load, item: bytes) -> Any:
    if load.wire == "grpc":
        from tritonclient.grpc import InferInput
    else:
        from tritonclient.http import InferInput
    tensor = InferInput(load.workload.tensor, [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[item]], np.object_))
    return tensor
