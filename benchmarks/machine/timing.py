"""Timing of calls; all benchmarks use these functions."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from serving.util.results import Timing

T = TypeVar("T")

_ROUND_SECONDS = 0.02
"""A round repeats a shorter call, so that clock and synchronization overhead is negligible."""
_REPEATS = 200
_WARM_UP_SECONDS = 0.1
"""Minimum duration of the warm-up, which has two calls at least: an idle GPU has low clocks."""
_WARM_UPS = 200


def once(call: Callable[[], T]) -> tuple[T, float]:
    """Return the result of `call` and its duration in seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def timed(call: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Return the duration of `call` in seconds for each round, including its work on `device`.

    A short call is repeated within a round, and the duration is the mean. Warm-up calls precede the
    first round.
    """

    def finished(repeats: int) -> None:
        for _ in range(repeats):
            call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    seconds, warm_until = 0.0, time.perf_counter() + _WARM_UP_SECONDS
    for done in range(_WARM_UPS):
        if done > 1 and time.perf_counter() > warm_until:
            break
        _, seconds = once(lambda: finished(1))
    repeats = min(_REPEATS, max(1, math.ceil(_ROUND_SECONDS / seconds)))
    return [once(lambda: finished(repeats))[1] / repeats for _ in range(rounds)]


def timing_of(seconds: Sequence[float]) -> Timing:
    """Summarize repeated measurements of one call."""
    low, middle, high = np.percentile(np.multiply(seconds, 1e3), (25, 50, 75)).tolist()
    return Timing(milliseconds=middle, quartiles=(low, high), rounds=len(seconds))
