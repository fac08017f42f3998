"""INT8: activation ranges by MinMax, Percentile and Entropy."""

import numpy as np
import onnx
import pytest

from export.int8.ranges import BINS, PERCENTILE, activation_ranges, runs
from tests.support.int8_graphs import METHODS, arrays, ranges


def by_hand(model: onnx.ModelProto, batches: list[np.ndarray]) -> dict[str, np.ndarray]:
    """All magnitudes of every tensor, by NumPy."""
    weights = arrays(model)
    x = np.concatenate(batches)
    z = np.maximum(x @ weights["first"], 0)
    return {"x": np.abs(x), "z": np.abs(z), "out": np.abs(z @ weights["second"])}


def test_minmax_is_the_largest_magnitude(small, batches):
    want = by_hand(small, batches)
    got = ranges(small, ["x", "z", "out"], batches, "minmax")
    assert got == {name: pytest.approx(float(want[name].max()), rel=1e-5) for name in want}


def test_minmax_includes_negative_values(small, batches):
    batches = [*batches, np.full((1, 24), -50, np.float32)]
    assert ranges(small, ["x"], batches, "minmax") == {"x": 50}


def test_percentile_equals_numpy_within_a_bin(small, batches):
    want = by_hand(small, batches)
    got = ranges(small, list(want), batches, "percentile")
    for name, magnitudes in want.items():
        exact = np.percentile(magnitudes, PERCENTILE, method="inverted_cdf")
        assert got[name] == pytest.approx(exact, abs=1.01 * magnitudes.max() / BINS)
        assert got[name] <= magnitudes.max() * (1 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_only_minmax_keeps_a_single_outlier(small, method):
    """One value in 240,000 lies at 60 times the standard deviation of the rest."""
    batch = np.random.default_rng(0).normal(size=(10_000, 24)).astype(np.float32)
    batch[17, 3] = -60
    (got,) = ranges(small, ["x"], [batch], method).values()
    if method == "minmax":
        assert got == 60
    else:
        assert 2.5 < got < 7


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_nearly_all_of_a_flat_distribution(small, method):
    batch = np.random.default_rng(0).uniform(-2, 2, (10_000, 24)).astype(np.float32)
    (got,) = ranges(small, ["x"], [batch], method).values()
    assert 1.95 < got <= 2


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_deterministic(small, batches, method):
    tensors = ["x", "z"]
    assert ranges(small, tensors, batches, method) == ranges(small, tensors, batches, method)
    assert list(ranges(small, tensors, iter(batches), method)) == tensors


@pytest.mark.parametrize("method", METHODS)
def test_zero_tensor_has_zero_range(small, method):
    (got,) = ranges(small, ["x"], [np.zeros((3, 24), np.float32)], method).values()
    assert got == 0


@pytest.mark.parametrize("method", METHODS)
def test_progress_counts_every_run(small, batches, method):
    calls = []
    activation_ranges(small, ["x"], batches, method, lambda: calls.append(1))
    assert len(calls) == runs(method) * len(batches)


MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
