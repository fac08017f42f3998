"""Demo data set: captioned pictures of colored shapes.

Ten shapes and ten colors make a hundred pairs. The pairs in `HELD_OUT` are neither drawn nor
described in training; a model that recognizes them has learned to combine words.

`draw` draws a scene and `caption` describes it. `draw_labelled` makes a test set, `write_folder`
writes picture files. This module needs numpy and Pillow, but not torch.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from serving.errors import InputError
from serving.util.files import check_directory, new_file, write_text
from training.scenes import (
    COLOURS,
    HELD_OUT,
    PAIRS,
    SEEN,
    SHAPES,
    Pair,
    Scene,
    Thing,
    choose,
    couple,
    single,
)

__all__ = [
    "COLOURS",
    "HELD_OUT",
    "PAIRS",
    "SEEN",
    "SHAPES",
    "TEMPLATES",
    "Pair",
    "caption",
    "draw",
    "draw_labelled",
    "label",
    "write_folder",
]

Point = tuple[float, float]
Polygon = list[Point]

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "there is {}",
)
"""Templates for a noun with its article. Words for position or background can follow the noun."""

OVERSAMPLING = 4
"""Factor of the finer grid on which outlines are filled, which makes their edges smooth."""


def _regular(corners: int, radius: float = 1.0, notch: float | None = None) -> Polygon:
    """Return a regular polygon around the origin, or a star with the inner radius `notch`."""
    count = corners if notch is None else 2 * corners
    points = []
    for i in range(count):
        reach = radius if notch is None or i % 2 == 0 else notch
        turn = 2 * math.pi * i / count
        points.append((reach * math.sin(turn), -reach * math.cos(turn)))
    return points


def _disc(radius: float, x: float = 0.0, y: float = 0.0) -> Polygon:
    return [(x + a, y + b) for a, b in _regular(48, radius)]


def _heart() -> Polygon:
    """Return the usual parametric heart curve, scaled into the unit circle."""
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 17, -height / 17 - 0.1))
    return points


def _cross(arm: float = 0.27) -> Polygon:
    corner = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    quarters = [corner]
    for _ in range(3):
        quarters.append([(-y, x) for x, y in quarters[-1]])
    return [point for quarter in quarters for point in quarter]


_ARROW: Polygon = [
    (1.0, 0.0), (0.1, -0.8), (0.1, -0.28), (-0.95, -0.28), (-0.95, 0.28), (0.1, 0.28), (0.1, 0.8),
]  # fmt: skip
_PETALS = [_disc(0.34, 0.66 * x, 0.66 * y) for x, y in _regular(5)]

OUTLINES: dict[str, tuple[list[Polygon], list[Polygon]]] = {
    "circle": ([_disc(0.9)], []),
    "square": ([[(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)]], []),
    "triangle": ([_regular(3)], []),
    "star": ([_regular(5, notch=0.42)], []),
    "heart": ([_heart()], []),
    "moon": ([_disc(0.95)], [_disc(0.78, 0.5)]),
    "ring": ([_disc(0.95)], [_disc(0.55)]),
    "cross": ([_cross()], []),
    "arrow": ([_ARROW], []),
    "flower": ([*_PETALS, _disc(0.5)], [_disc(0.27)]),
}
"""Outlines by shape, in the unit circle: polygons to fill, and polygons to cut out of them."""


def draw(scene: Scene, size: int) -> Image.Image:
    """Draw `scene` as an RGB picture of `size` x `size` pixels."""
    side = np.arange(size, dtype=np.float32) / size - 0.5
    ramp = math.cos(scene.slope) * side[None, :] + math.sin(scene.slope) * side[:, None]
    first, last = (np.array(tint, np.float32) for tint in scene.tints)
    canvas = first + (last - first) * np.clip(ramp + 0.5, 0, 1)[..., None]
    texture = _texture(scene, size)[..., None]
    canvas += texture
    for thing in scene.things:
        mask = _mask(thing, size)[..., None]
        # The texture is fainter on a shape than on the background, to keep the shape's color.
        canvas += mask * (np.array(thing.rgb, np.float32) + 0.4 * texture - canvas)
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


def _texture(scene: Scene, size: int) -> NDArray[np.float32]:
    """Return the texture as gray levels to add, float32 [size, size]."""
    cells = np.random.default_rng(scene.seed).normal(0, 1, (scene.grain, scene.grain))
    grid = Image.fromarray((scene.texture * cells).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BILINEAR))


def _mask(thing: Thing, size: int) -> NDArray[np.float32]:
    """Return the fraction of each pixel that `thing` covers, float32 [size, size]."""
    fine = size * OVERSAMPLING
    mask = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(mask)
    cosine, sine = (f(math.radians(thing.angle)) * thing.radius for f in (math.cos, math.sin))
    for polygons, ink in zip(OUTLINES[thing.shape], (255, 0), strict=True):
        for polygon in polygons:
            corners = [
                ((thing.x + cosine * x - sine * y) * fine, (thing.y + sine * x + cosine * y) * fine)
                for x, y in polygon
            ]
            pen.polygon(corners, fill=ink)
    return np.asarray(mask.reduce(OVERSAMPLING), np.float32) / 255


def label(pair: Pair) -> str:
    """Return the label of a pair, such as `a red circle`."""
    return _article(" ".join(pair))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a random caption of `scene`: its shapes, sometimes with size, position or background.

    A caption is always true, but can be incomplete, such as `something red`.
    """
    describe = _describe_single if len(scene.things) == 1 else _describe_couple
    words = describe(scene, rng)
    if rng.random() < 0.35:
        ground = f"{scene.background} background"
        words += choose(rng, (f" on {_article(ground)}", f", {ground}"))
    if not words.startswith("something"):
        words = choose(rng, TEMPLATES).format(words) if rng.random() < 0.6 else words
    return f"{words}." if rng.random() < 0.15 else words


def _describe_single(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a single shape by color or shape or both, sometimes with its position."""
    (thing,) = scene.things
    style = rng.random()
    if style < 0.06:
        noun = choose(rng, ("thing", "object", ""))
        return _article(f"{thing.colour} {noun}") if noun else f"something {thing.colour}"
    if style < 0.12:
        return _article(thing.shape)
    if style < 0.2:
        return _noun(thing, rng)
    words = _article(_noun(thing, rng))
    return f"{words} {_place(scene.row, scene.column)}" if style < 0.5 else words


def _describe_couple(scene: Scene, rng: np.random.Generator) -> str:
    """Describe two shapes in random order, sometimes with their relative position."""
    one, other = scene.things if rng.random() < 0.5 else scene.things[::-1]
    if abs(one.x - other.x) > abs(one.y - other.y):
        relation = "to the left of" if one.x < other.x else "to the right of"
    else:
        relation = "above" if one.y < other.y else "below"
    between = choose(rng, ("and", "next to", relation, relation))
    return f"{_article(_noun(one, rng))} {between} {_article(_noun(other, rng))}"


def _noun(thing: Thing, rng: np.random.Generator) -> str:
    """Return color and shape, such as `red circle`, sometimes with the size."""
    words = (thing.colour, thing.shape)
    return " ".join((thing.size, *words) if thing.size and rng.random() < 0.5 else words)


def _place(row: str, column: str) -> str:
    if row and column:
        return f"in the {row} {column} corner"
    if row:
        return f"at the {row}"
    return f"on the {column}" if column else "in the centre"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def draw_labelled(
    seed: int, count: int, size: int, pairs: Sequence[Pair] = PAIRS
) -> Iterator[tuple[Image.Image, str]]:
    """Yield `count` RGB pictures of one shape each, `size` x `size` pixels, with their labels.

    Pairs are used in turn, so that each occurs equally often. The same arguments give the same
    pictures.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        pair = pairs[index % len(pairs)]
        yield draw(single(rng, pair), size), label(pair)


def write_folder(
    directory: Path, count: int, seed: int, size: int, pairs: Sequence[Pair] = PAIRS
) -> list[tuple[Path, str]]:
    """Write picture files and a `captions.txt` with one `file, caption` per line.

    Every fourth file is a PNG, the others are JPEGs of quality 90. Two of three pictures show one
    shape and have its label as their caption; every third picture shows two shapes. `directory` is
    created if it does not exist.

    Returns:
        The path and the caption of each picture.

    Raises:
        InputError: `directory` already has a `captions.txt`.
    """
    check_directory(directory)
    listing = directory / "captions.txt"
    if listing.exists():
        raise InputError(f"{listing} exists already", advice="give an empty or a new directory")
    rng = np.random.default_rng(seed)
    written = []
    for index in range(count):
        if index % 3 == 2:
            scene = couple(rng, (choose(rng, pairs), choose(rng, pairs)))
            text = caption(scene, rng)
        else:
            pair = choose(rng, pairs)
            scene, text = single(rng, pair), label(pair)
        path = directory / f"{index:04d}.{'png' if index % 4 == 3 else 'jpg'}"
        with new_file(path) as file:
            draw(scene, size).save(file, "PNG" if path.suffix == ".png" else "JPEG", quality=90)
        written.append((path, text))
    lines = [f"{path.name}, {text}\n" for path, text in written]
    write_text(listing, "".join(lines))
    return written
