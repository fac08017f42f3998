"""How a call is timed in turns with a reference.

The machine drifts, so a call takes turns with the reference, PyTorch's eager float32 tower. In its
turn either runs untimed before it is timed: the other one left its weights in the caches and its
threads spinning. Threads of plain ONNX Runtime spin so long that the reference waits for them.
Between runs and machines, only the ratio of the two in adjacent turns can be compared.
"""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.machine.timing import once

_TURN_SECONDS, _TURN_RUNS = 0.15, 30
"""A turn lasts about this long and has at most one run more than this. Half of the runs are timed.
A call that takes longer than a turn runs once a turn. (An int8 text tower after eager float32: its
quartiles were 28 to 47 ms after one untimed run, 27 to 30 ms after five.)"""
_REST_SECONDS = 0.08
"""Pause before the reference. Threads of plain ONNX Runtime spin for 50 ms after a run, on CPUs
that the reference needs: eager float32 took up to 267 ms for an image then, 100 to 160 ms
otherwise."""
_SLOW_SECONDS = 1.5
"""Two turns that take longer than this are repeated less often."""


class Turns:
    """Alternates a call and a reference; a round of pytest-benchmark is one timed run of the call.

    Args:
        reference: returns something, kept as `reference_result`.
        call: what is timed, by pytest-benchmark's pedantic mode with `setup`.
    """

    def __init__(self, reference: Callable[[], Any], call: Callable[[], Any]) -> None:
        self._reference, self._call = reference, call
        self.reference_result: Any = None
        self.reference_seconds: list[list[float]] = []
        """Timed runs of the reference, a list a turn."""
        seconds = self._refer()
        self._reference_untimed, self._reference_timed = _turn_of(seconds)
        once(call)  # allocation, compilation
        _, more = once(call)
        self._untimed, self._timed = _turn_of(more)
        self._both = _REST_SECONDS + sum(_turn_of(seconds)) * seconds + sum(_turn_of(more)) * more
        self._rounds = 0

    def rounds(self, budget: float) -> int:
        """Return the rounds that fit into `budget` seconds, of 3 (of slow calls) to 15 turns."""
        return self._turns(budget) * self._timed

    def expected_seconds(self, budget: float) -> float:
        """Return how long the rounds will take."""
        return self._turns(budget) * self._both

    def setup(self) -> None:
        """Run, where a turn begins, the reference's turn and the untimed runs of the call."""
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
        """Median over all timed runs of the reference."""
        return median(second for turn in self.reference_seconds for second in turn) * 1e3

    def ratios(self, seconds: Sequence[float]) -> tuple[float, ...]:
        """Return the reference's median over the call's, a value a turn.

        Args:
            seconds: of all timed runs of the call, turn after turn.
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
    """Return the untimed and the timed runs of a turn of a call that takes so long."""
    settle = math.ceil(_TURN_SECONDS / seconds)
    runs = 1 if settle == 1 else min(settle, _TURN_RUNS) + 1
    return runs // 2, runs - runs // 2
