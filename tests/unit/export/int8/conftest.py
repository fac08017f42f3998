"""Fixtures: small graphs to quantize."""

import numpy as np
import onnx
import pytest
import torch

from export.towers.clip import (
    Clip,
)
from tests.support.int8_graphs import FRESH, MEAN, STD, WIDE, two_layers


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    # Columns of very different magnitude, for which a single scale would be inaccurate.
    first = (rng.normal(size=(24, 16)) * 10.0 ** np.arange(-3, 1, 0.25)).astype(np.float32)
    return two_layers(first, rng.normal(size=(16, 8)).astype(np.float32))


@pytest.fixture(scope="module")
def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(n, 24)).astype(np.float32) * s for n, s in ((50, 1), (7, 3), (90, 2))]


@pytest.fixture(scope="module")
def tower():
    """An image tower whose size is mostly matrices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Clip(WIDE, MEAN, STD).eval().image


@pytest.fixture(scope="module")
def eager(tower) -> np.ndarray:
    with torch.inference_mode():
        return tower(torch.from_numpy(FRESH)).numpy()
