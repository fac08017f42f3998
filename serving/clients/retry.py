"""Retries with exponential backoff and full jitter.

A request is retried if the server did not accept it: no server listened, the connection broke, or
the queues were full. Retries are safe, because the same images and texts always give the same
answer. A request that was invalid or exceeded its deadline is not retried.

Each pause is drawn at random between zero and a limit that doubles ("full jitter": Brooker,
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015), so that clients that were rejected
together do not return together.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from serving.errors import UnavailableError

T = TypeVar("T")

FIRST_S = 0.1
"""Maximum of the first pause, in seconds."""
LONGEST_S = 2.0
"""Maximum of any pause, in seconds."""


def pauses(attempts: int, draw: Callable[[], float] = random.random) -> Iterator[float]:
    """Yield the pauses between `attempts` attempts, in seconds.

    Args:
        attempts: number of attempts; there is one pause less.
        draw: returns random numbers in [0, 1).
    """
    for number in range(attempts - 1):
        yield draw() * min(LONGEST_S, FIRST_S * 2**number)


def retried(action: Callable[[float], T], attempts: int, timeout: float) -> T:
    """Call `action` until it succeeds, and return its result.

    Args:
        action: takes the number of seconds that are left; the first call gets `timeout`.
        attempts: maximum number of calls; none begins after `timeout`.
        timeout: seconds for all attempts and pauses together.

    Raises:
        UnavailableError: every attempt failed. The error has the class of the last attempt's error
            and states the number of attempts.
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
                    f"{error.reason} (tried {number} times in {taken:.1f} s)", advice=error.advice
                ) from error
        time.sleep(pause)
