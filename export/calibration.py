"""Batches to probe a model with: pictures with structure, texts of every length."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.bundle import ImageSpec, TextSpec, Tower
from serving.runners.base import Batch

_IMAGE_BATCHES = (1, 2, 5, 8)
_TEXT_BATCHES = (1, 3, 8)


def probe_images(spec: ImageSpec, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """`count` pictures [count, 3, size, size] that are smooth in places and noisy in others.

    Pure noise would look alike to any tower. These are coarse colour grids enlarged to the size,
    each with its own coarseness, contrast and noise.
    """
    rng = np.random.default_rng(seed)
    pictures = np.empty((count, 3, spec.size, spec.size), np.uint8)
    for index in range(count):
        cells = int(rng.integers(2, 24))
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = np.asarray(grid.resize((spec.size, spec.size), Image.Resampling.BICUBIC), float)
        noisy = smooth * rng.uniform(0.3, 1) + rng.normal(0, rng.uniform(0, 40), smooth.shape)
        pictures[index] = np.clip(noisy, 0, 255).astype(np.uint8).transpose(2, 0, 1)
    return pictures


def probe_texts(spec: TextSpec, count: int, length: int, seed: int = 0) -> NDArray[np.int32]:
    """`count` token rows [count, length]: start, random tokens, end, padding; no two end alike."""
    rng = np.random.default_rng((seed, length))
    ids = np.full((count, length), spec.pad_id, np.int32)
    for row in ids:
        end = int(rng.integers(1, length))
        row[:end] = rng.integers(0, min(spec.start_id, spec.end_id), end)
        row[0], row[end] = spec.start_id, spec.end_id
    return ids


def probes(tower: Tower, image: ImageSpec, text: TextSpec, seed: int = 0) -> Iterator[Batch]:
    """Batches of several sizes and, for text, of every bucket and the shortest length there is."""
    if tower == "image":
        for size in _IMAGE_BATCHES:
            yield probe_images(image, size, seed + size)
    else:
        for length in (2, *text.buckets):
            for size in _TEXT_BATCHES:
                yield probe_texts(text, size, length, seed + size)
