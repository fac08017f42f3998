"""Timing of a call in turns with a reference, usually PyTorch's eager float32 tower.

The speed of a machine drifts, so the call and the reference alternate. After the previous turn, the
caches hold other weights, and threads may still spin. Each turn therefore starts with untimed runs,
unless a single run fills the turn. A pause precedes each turn of the reference, because threads of
plain ONNX Runtime spin for 50 ms. Only the ratio of adjacent turns is comparable between runs and
machines.
"""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.machine.timing import once

_TURN_SECONDS, _TURN_RUNS = 0.15, 30
"""Approximate duration of a turn in seconds, and the maximum number of runs in a turn minus one.

The second half of the runs is timed. A call that takes longer than `_TURN_SECONDS` runs once per
turn. An INT8 text tower after eager float32 had quartiles of 28 and 47 ms after one untimed run,
and of 27 and 30 ms after five."""
_REST_SECONDS = 0.08
"""Pause before the reference. After a run, threads of plain ONNX Runtime spin for 50 ms on CPUs
that the reference needs. Eager float32 then took up to 267 ms per image, instead of 100 to 160."""
_SLOW_SECONDS = 1.5
"""If a pair of turns takes longer than this, at least 3 pairs are run instead of at least 5."""


class Turns:
    """Alternates a call and a reference; a round of pytest-benchmark is one timed run of the call.

    Args:
        reference: reference call; its last result is kept as `reference_result`.
        call: call that pytest-benchmark's pedantic mode times, with `setup`.
    """

    def __init__(self, reference: Callable[[], Any], call: Callable[[], Any]) -> None:
        self._reference, self._call = reference, call
        self.reference_result: Any = None
        self.reference_seconds: list[list[float]] = []
        """Seconds of the timed runs of the reference, one list per turn."""
        seconds = self._refer()
        self._reference_untimed, self._reference_timed = _turn_of(seconds)
        once(call)  # warm-up: allocation, compilation
        _, more = once(call)
        self._untimed, self._timed = _turn_of(more)
        self._both = _REST_SECONDS + sum(_turn_of(seconds)) * seconds + sum(_turn_of(more)) * more
        self._rounds = 0

    def rounds(self, budget: float) -> int:
        """Return the number of rounds that fit into `budget` seconds.

        They make up 5 to 15 turns, or 3 to 15 if the turns are slow.
        """
        return self._turns(budget) * self._timed

    def expected_seconds(self, budget: float) -> float:
        """Return the expected duration of the rounds in seconds."""
        return self._turns(budget) * self._both

    def setup(self) -> None:
        """Run a turn of the reference and the untimed runs of the call, if a turn starts."""
        if self._rounds % self._timed == 0:
            time.sleep(_REST_SECONDS)
            for _ in range(self._reference_untimed):
                self._reference()
            self.reference_seconds.append([self._refer() for _ in range(self._reference_timed)])
            for _ in range(self._untimed):
                self._call()
        self._rounds += 1

    @property
    def reference_ms(self) -> float:
        """Median of all timed runs of the reference, in milliseconds."""
        return median(second for turn in self.reference_seconds for second in turn) * 1e3

    def ratios(self, seconds: Sequence[float]) -> tuple[float, ...]:
        """Return the median of the reference divided by that of the call, for each turn.

        Args:
            seconds: seconds of all timed runs of the call, in order.
        """
        by_turn = np.reshape(seconds, (len(self.reference_seconds), -1))
        ratios = np.divide(np.median(self.reference_seconds, axis=1), np.median(by_turn, axis=1))
        return tuple(ratios.tolist())

    def _turns(self, budget: float) -> int:
        least = 3 if self._both > _SLOW_SECONDS else 5
        return min(15, max(least, int(budget / self._both)))

    def _refer(self) -> float:
        self.reference_result, seconds = once(self._reference)
        return seconds


def _turn_of(seconds: float) -> tuple[int, int]:
    """Return the numbers of untimed and timed runs in a turn of a call that takes `seconds`."""
    settle = math.ceil(_TURN_SECONDS / seconds)
    runs = 1 if settle == 1 else min(settle, _TURN_RUNS) + 1
    return runs // 2, runs - runs // 2
