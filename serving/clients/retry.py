"""Asking a server again: what for, how often, and after which pauses.

Asked again is what the server did not take: nobody listened, the connection broke, or it was full.
That is safe, since the same pictures and texts give the same answer. A request that was wrong, or
that ran out of time, is not repeated.

Pauses double, and each is drawn between nothing and its full length ("full jitter": Brooker,
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015), so that clients that were refused
together do not come back together.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from serving.errors import UnavailableError

T = TypeVar("T")

FIRST_S = 0.1
"""The first pause, at most."""
LONGEST_S = 2.0
"""Every other pause, at most."""


def pauses(attempts: int, draw: Callable[[], float] = random.random) -> Iterator[float]:
    """Seconds between so many attempts, one less than these; `draw` gives numbers in [0, 1)."""
    for number in range(attempts - 1):
        yield draw() * min(LONGEST_S, FIRST_S * 2**number)


def retried(action: Callable[[float], T], attempts: int, timeout: float) -> T:
    """What `action` returns, which is given the seconds it may take; the first time, all of them.

    Args:
        attempts: at most, pauses permitting: none begins after `timeout`.
        timeout: seconds for all attempts and pauses together.

    Raises:
        UnavailableError: the last attempt's, of the same class; it says how often was asked.
    """
    begin, left, number, waits = time.monotonic(), timeout, 0, pauses(attempts)
    while True:
        number += 1
        try:
            return action(left)
        except UnavailableError as error:
            pause, taken = next(waits, math.inf), time.monotonic() - begin
            left = timeout - taken - pause
            if left <= 0:
                if number == 1:
                    raise
                raise type(error)(
                    f"{error.reason} (asked {number} times in {taken:.1f} s)", advice=error.advice
                ) from error
        time.sleep(pause)
