"""Parallel drawing of the training pictures, before training.

The work is split into chunks, each with its own seed. The pictures therefore depend only on the
seed and their number, not on the number of processes. This module does not import torch, so that
processes start fast and use little memory.
"""

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from serving.bundles.manifest import ImageSpec
from serving.inputs.preprocess import preprocess
from serving.util.progress import Progress, silent, tracked
from training.scenes import COLOURS, SEEN, Pair, Scene, choose, lineup, portraits, swapped_couples
from training.shapes import TEMPLATES, caption, draw, label

SIZES = (64, 80, 96, 128, 192)
"""Sizes of drawn pictures, in pixels. They are then resized with the server's preprocessing."""
CHUNK = 256
CAPTIONS = 2
"""Number of captions per picture."""
LINEUP = 8
"""Number of pictures in a group that differ only in their shape. Every color has at least this many
shapes in training."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Drawn pictures and their captions."""

    pixels: NDArray[np.uint8]
    """Pictures, uint8 [pictures, 3, size, size]."""
    captions: list[list[str]]
    """`CAPTIONS` captions of each picture."""


def same_colour(rng: np.random.Generator) -> list[Pair]:
    """Return `LINEUP` pairs of one random color, which differ only in their shape."""
    colour = choose(rng, COLOURS)
    pairs = [pair for pair in SEEN if pair[0] == colour]
    return [pairs[i] for i in rng.permutation(len(pairs))[:LINEUP]]


def plain(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption of a scene with one shape: only its color and shape."""
    (thing,) = scene.things
    return choose(rng, TEMPLATES).format(label((thing.colour, thing.shape)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Functions that make one kind of training pictures."""

    scenes: Callable[[np.random.Generator], list[Scene]]
    """Returns a group of scenes, which belong in one batch."""
    members: int
    """Number of scenes in a group."""
    describe: Callable[[Scene, np.random.Generator], str] = caption
    """Returns a caption of a scene."""


# Groups of pictures that differ only in their shape make the model learn shapes. Without them, a
# batch has few such pictures, and the loss is small with colors, positions and backgrounds alone.
KINDS = {
    "portrait": Recipe(lambda rng: portraits(rng, same_colour(rng)), LINEUP, plain),
    "single": Recipe(lambda rng: lineup(rng, same_colour(rng)), LINEUP),
    "couple": Recipe(lambda rng: list(swapped_couples(rng, SEEN)), 2),
}


def draw_chunk(image: ImageSpec, seed: int, kind: str, chunk: int) -> Drawn:
    """Draw a chunk of at least `CHUNK` pictures. The pictures of a group are consecutive."""
    recipe = KINDS[kind]
    rng = np.random.default_rng([seed, list(KINDS).index(kind), chunk])
    scenes: list[Scene] = []
    while len(scenes) < CHUNK:
        scenes += recipe.scenes(rng)
    pixels = [preprocess(draw(scene, choose(rng, SIZES)), image) for scene in scenes]
    captions = [[recipe.describe(scene, rng) for _ in range(CAPTIONS)] for scene in scenes]
    return Drawn(np.stack(pixels), captions)


def draw_pool(
    counts: Mapping[str, int],
    image: ImageSpec,
    seed: int,
    workers: int,
    progress: Progress = silent,
) -> dict[str, Drawn]:
    """Draw pictures in parallel.

    Args:
        counts: number of pictures of each kind; it is rounded up to whole chunks.
        image: preprocessing of the image tower.
        seed: seed of the pictures.
        workers: number of processes.
        progress: called after each chunk.

    Returns:
        The pictures by kind.
    """
    jobs = [(kind, chunk) for kind in counts for chunk in range(-(-counts[kind] // CHUNK))]
    job = partial(draw_chunk, image, seed)
    # Processes are spawned, because torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        chunks = executor.map(job, *zip(*jobs, strict=True))
        parts = list(tracked(progress, "drawing", chunks, len(jobs)))
    drawn = {}
    for kind in counts:
        chosen = [part for part, (name, _) in zip(parts, jobs, strict=True) if name == kind]
        captions = [texts for part in chosen for texts in part.captions]
        drawn[kind] = Drawn(np.concatenate([part.pixels for part in chosen]), captions)
    return drawn
