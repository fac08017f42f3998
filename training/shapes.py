"""Captioned pictures of coloured shapes: the demo data set.

Ten shapes times ten colours make a hundred pairs. `HELD_OUT` pairs never occur in training, neither
drawn nor described: a model that names them has learnt that words compose.

`draw` makes a picture of a scene, `caption` words for it; `draw_labelled` is a test set and
`write_folder` a folder of picture files. Needs numpy and Pillow, never torch.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from serving.errors import InputError
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
"""Wordings around a noun with its article; what follows the noun may follow the template too."""

OVERSAMPLING = 4
"""Outlines are filled on a finer grid, which makes their edges smooth."""


def _regular(corners: int, radius: float = 1.0, notch: float | None = None) -> Polygon:
    """Corners of a regular polygon around the origin; of a star with `notch`, its inner radius."""
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
    """The well-known parametric heart, scaled into the unit circle."""
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
"""By shape, in the unit circle: polygons to fill, and polygons to cut out of them again."""


def draw(scene: Scene, size: int) -> Image.Image:
    """An RGB picture of `scene`, `size` x `size` pixels."""
    side = np.arange(size, dtype=np.float32) / size - 0.5
    ramp = math.cos(scene.slope) * side[None, :] + math.sin(scene.slope) * side[:, None]
    first, last = (np.array(tint, np.float32) for tint in scene.tints)
    canvas = first + (last - first) * np.clip(ramp + 0.5, 0, 1)[..., None]
    texture = _texture(scene, size)[..., None]
    canvas += texture
    for thing in scene.things:
        mask = _mask(thing, size)[..., None]
        # The texture goes on over the thing, fainter: its colour must stay the one in its name.
        canvas += mask * (np.array(thing.rgb, np.float32) + 0.4 * texture - canvas)
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


def _texture(scene: Scene, size: int) -> NDArray[np.float32]:
    """Grey levels to add, float32 [size, size]: noise on the scene's own grid."""
    cells = np.random.default_rng(scene.seed).normal(0, 1, (scene.grain, scene.grain))
    grid = Image.fromarray((scene.texture * cells).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BILINEAR))


def _mask(thing: Thing, size: int) -> NDArray[np.float32]:
    """How much of each pixel `thing` covers, float32 [size, size] in 0..1."""
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
    """The plain caption of a pair: `a red circle`."""
    return _article(" ".join(pair))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Words for `scene`: what is in it, and at random its size, its place, its background.

    Everything said is true of the scene; a caption may say less than everything, down to
    `something red`.
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
    """A thing alone, perhaps only its colour or only its shape, perhaps with its place."""
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
    """Both things, in either order, perhaps with how they stand to each other."""
    one, other = scene.things if rng.random() < 0.5 else scene.things[::-1]
    if abs(one.x - other.x) > abs(one.y - other.y):
        relation = "to the left of" if one.x < other.x else "to the right of"
    else:
        relation = "above" if one.y < other.y else "below"
    between = choose(rng, ("and", "next to", relation, relation))
    return f"{_article(_noun(one, rng))} {between} {_article(_noun(other, rng))}"


def _noun(thing: Thing, rng: np.random.Generator) -> str:
    """`red circle`, at random with its size."""
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
    """`count` RGB pictures of one thing each, `size` x `size`, with the plain caption.

    Goes through `pairs` in turn, so that each occurs equally often. The same arguments give the
    same pictures.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        pair = pairs[index % len(pairs)]
        yield draw(single(rng, pair), size), label(pair)


def write_folder(
    directory: Path, count: int, seed: int, size: int, pairs: Sequence[Pair] = PAIRS
) -> list[tuple[Path, str]]:
    """Write `count` picture files and `captions.txt` (`file, caption` a line); returns the pairs.

    Every fourth file is a PNG, the others are JPEGs of quality 90. Two of three pictures show one
    thing and have its plain caption, the third shows two. `directory` is made if need be.

    Raises:
        InputError: `directory` holds a `captions.txt` already.

    """
    listing = directory / "captions.txt"
    if listing.exists():
        raise InputError(f"{listing} exists already; give an empty or a new folder")
    directory.mkdir(parents=True, exist_ok=True)
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
        draw(scene, size).save(path, quality=90)
        written.append((path, text))
    lines = [f"{path.name}, {text}\n" for path, text in written]
    listing.write_text("".join(lines), encoding="utf-8")
    return written
