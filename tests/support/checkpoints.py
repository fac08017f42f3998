"""Checkpoints to load, edit and compare."""

import numpy as np
import pytest
import torch

from export.checkpoints.load import load_checkpoint
from serving.errors import CheckpointError
from tests.support.references import (
    some_ids,
    some_pixels,
)

IDS = some_ids([1, 5, 76])


def embeddings(checkpoint) -> tuple[np.ndarray, np.ndarray]:
    pixels = some_pixels(3, checkpoint.image.size)
    with torch.inference_mode():
        return (
            checkpoint.clip.image(torch.from_numpy(pixels)).numpy(),
            checkpoint.clip.text(torch.from_numpy(IDS)).numpy(),
        )


def assert_same(checkpoint, expected, tolerance: float = 1e-5) -> None:
    for got, want in zip(embeddings(checkpoint), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance)


def refused(name, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(name), **options)
    return str(caught.value)
