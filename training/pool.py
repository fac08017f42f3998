"""Draws the training pictures on all cores, before training.

Work is split into chunks with a seed each, so the pictures depend on the seed and their number
only, not on how many processes drew them. Without torch: the processes start fast and stay small.
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
"""Pixels that pictures are drawn at; they are then resized as a server would resize them."""
CHUNK = 256
CAPTIONS = 2
"""Captions of each picture."""
LINEUP = 8
"""Pictures that differ in their shape only; every colour has this many shapes in training."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures and what is said of them."""

    pixels: NDArray[np.uint8]
    """[pictures, 3, size, size]."""
    captions: list[list[str]]
    """`CAPTIONS` texts for each picture."""


def same_colour(rng: np.random.Generator) -> list[Pair]:
    """`LINEUP` pairs of one colour: among them, only the shape tells which picture is meant."""
    colour = choose(rng, COLOURS)
    pairs = [pair for pair in SEEN if pair[0] == colour]
    return [pairs[i] for i in rng.permutation(len(pairs))[:LINEUP]]


def plain(scene: Scene, rng: np.random.Generator) -> str:
    """Colour and shape of a thing alone, and no more."""
    (thing,) = scene.things
    return choose(rng, TEMPLATES).format(label((thing.colour, thing.shape)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one kind of training pictures comes about."""

    scenes: Callable[[np.random.Generator], list[Scene]]
    """Draws a group of scenes that belong in one batch."""
    members: int
    """Scenes of a group."""
    describe: Callable[[Scene, np.random.Generator], str] = caption


# Without line-ups the loss is small as soon as colours, places and backgrounds are known, and the
# shapes stay unlearnt: a batch has few pictures that differ in nothing else.
KINDS = {
    "portrait": Recipe(lambda rng: portraits(rng, same_colour(rng)), LINEUP, plain),
    "single": Recipe(lambda rng: lineup(rng, same_colour(rng)), LINEUP),
    "couple": Recipe(lambda rng: list(swapped_couples(rng, SEEN)), 2),
}


def draw_chunk(image: ImageSpec, seed: int, kind: str, chunk: int) -> Drawn:
    """Draw `CHUNK` pictures; the scenes of one group follow each other."""
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
    """Draw pictures on `workers` processes: of each kind its count, rounded up to whole chunks."""
    jobs = [(kind, chunk) for kind in counts for chunk in range(-(-counts[kind] // CHUNK))]
    job = partial(draw_chunk, image, seed)
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        chunks = executor.map(job, *zip(*jobs, strict=True))
        parts = list(tracked(progress, "drawing", chunks, len(jobs)))
    drawn = {}
    for kind in counts:
        own = [part for part, (name, _) in zip(parts, jobs, strict=True) if name == kind]
        captions = [texts for part in own for texts in part.captions]
        drawn[kind] = Drawn(np.concatenate([part.pixels for part in own]), captions)
    return drawn
