"""Alternating rounds of a call and a reference, and the ratio of the two."""

import time
from functools import partial

import pytest

from benchmarks.latency.turns import Turns
from benchmarks.machine.timing import timing_of


def test_rounds_of_call_and_reference_alternate():
    calls = []
    turns = Turns(lambda: calls.append("reference"), lambda: calls.append("mine"))
    assert turns.rounds(1e-9) == 5 * 16  # half of 31 runs are timed
    turns._both = 2.0
    assert turns.rounds(1e-9) == 3 * 16
    assert turns.rounds(20.0) == 10 * 16
    assert turns.expected_seconds(20.0) == 20.0
    turns._both = 1e-6
    assert turns.rounds(1e9) == 15 * 16
    calls.clear()
    for _ in range(17):
        turns.setup()
        calls.append("timed")
    turn = ["reference"] * 31 + ["mine"] * 15 + ["timed"] * 16
    assert calls == (turn * 2)[: 31 + 15 + 16 + 31 + 15 + 1]
    assert list(map(len, turns.reference_seconds)) == [16, 16]


def test_slow_calls_have_no_warm_up_runs():
    calls = []
    slow = partial(time.sleep, 0.2)
    turns = Turns(
        lambda: (calls.append("reference"), slow()), lambda: (calls.append("mine"), slow())
    )
    assert turns.rounds(1e-9) == 5
    calls.clear()
    turns.setup()
    turns.setup()
    assert calls == ["reference"] * 2


def test_ratio_compares_adjacent_rounds():
    """The machine is half as fast in the second round, and one run of the third was interrupted."""
    turns = Turns(lambda: time.sleep(0.2), lambda: time.sleep(0.2))
    turns.reference_seconds = [[3.0, 3.0], [6.0, 6.0], [3.0, 3.0]]
    seconds = (1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 9.0, 1.0)
    assert turns.ratios(seconds) == (3.0, 3.0, 3.0)
    assert turns.reference_ms == 3000


def test_timings_are_medians_and_quartiles():
    timing = timing_of([0.004, 0.001, 0.002, 0.003, 0.1])
    assert timing.milliseconds == pytest.approx(3.0)
    assert timing.quartiles == pytest.approx((2.0, 4.0))
    assert timing.rounds == 5
    assert timing.spread == pytest.approx(2 / 3)
