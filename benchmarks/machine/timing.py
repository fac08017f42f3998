"""How a call is timed; everything here that times calls uses these functions."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from serving.util.results import Timing

T = TypeVar("T")

_ROUND_SECONDS = 0.02
"""A round repeats a shorter call, so that the clock and a synchronization weigh nothing."""
_REPEATS = 200
_WARM_UP_SECONDS = 0.1
"""Before the first round, and at least two calls: an idle GPU raises its clocks first."""
_WARM_UPS = 200


def once(call: Callable[[], T]) -> tuple[T, float]:
    """Return what `call` returns and the seconds that it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def timed(call: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Return the seconds that one `call` takes, a value a round, with its work on `device` done.

    A round repeats a short call and divides. Calls before the first round warm up.
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
