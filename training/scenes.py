"""Random scenes: colored shapes with sizes and positions, on a colored background.

A scene has everything that is random about a picture, so it looks the same at 64 and at 320 pixels.
`training.shapes` draws and describes scenes.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Pair = tuple[str, str]
"""Color and shape."""
Range = tuple[float, float]
RGB = tuple[int, int, int]

# Ranges of hue (in degrees), saturation and value in which a color has this name beyond doubt.
COLOUR_RANGES: dict[str, tuple[Range, Range, Range]] = {
    "red": ((-7, 5), (0.85, 1.0), (0.78, 0.95)),
    "orange": ((24, 33), (0.88, 1.0), (0.93, 1.0)),
    "yellow": ((53, 60), (0.75, 1.0), (0.92, 1.0)),
    "green": ((105, 140), (0.6, 1.0), (0.5, 0.8)),
    "blue": ((212, 232), (0.75, 1.0), (0.75, 1.0)),
    "purple": ((268, 285), (0.6, 0.95), (0.5, 0.75)),
    "pink": ((322, 340), (0.3, 0.5), (0.95, 1.0)),
    "brown": ((20, 28), (0.65, 0.85), (0.35, 0.5)),
    "white": ((0, 360), (0.0, 0.04), (0.94, 1.0)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.12)),
}
BACKGROUND_RANGES = {**COLOUR_RANGES, "gray": ((0, 360), (0.0, 0.05), (0.42, 0.62))}
COLOURS = tuple(COLOUR_RANGES)
SHAPES = (
    "circle", "square", "triangle", "star", "heart", "moon", "ring", "cross", "arrow", "flower",
)  # fmt: skip
"""Shapes that stay recognizable in any rotation."""

HELD_OUT: tuple[Pair, ...] = (
    ("red", "circle"),
    ("red", "cross"),
    ("orange", "square"),
    ("yellow", "triangle"),
    ("green", "star"),
    ("green", "arrow"),
    ("blue", "heart"),
    ("blue", "flower"),
    ("purple", "arrow"),
    ("pink", "moon"),
    ("brown", "ring"),
    ("white", "flower"),
    ("black", "star"),
)
"""Pairs that are neither drawn nor described in training. No color and no shape is held out more
than twice, so every word is learned from at least eight other pairs."""
PAIRS: tuple[Pair, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

ROWS = {"top": 0.27, "": 0.5, "bottom": 0.73}
COLUMNS = {"left": 0.27, "": 0.5, "right": 0.73}
TILT = 15.0
"""Standard deviation of the rotation of a shape, in degrees."""
RADII: dict[str, Range] = {"small": (0.18, 0.21), "": (0.24, 0.28), "large": (0.32, 0.38)}
"""Radius of the circle around a shape, as a fraction of the picture's side, by word for size."""


@dataclass(frozen=True, slots=True)
class Thing:
    """Shape in a scene. Lengths are fractions of the picture's side, the angle is in degrees."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: RGB


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two shapes on a background with a gradient from `tints[0]` to `tints[1]`."""

    things: tuple[Thing, ...]
    row: str
    column: str
    """Position of a single shape in words, with `row`. Both are empty in the center."""
    background: str
    tints: tuple[RGB, RGB]
    slope: float
    """Direction of the gradient, in radians."""
    texture: float
    """Amplitude of the texture, in gray levels."""
    grain: int
    """Number of texture cells along the picture's side."""
    seed: int
    """Seed of the texture."""


def single(rng: np.random.Generator, pair: Pair) -> Scene:
    """Return a scene with one shape at a random position."""
    return lineup(rng, [pair])[0]


def lineup(rng: np.random.Generator, pairs: Sequence[Pair]) -> list[Scene]:
    """Return a scene with one shape for each pair.

    All scenes have the same word for size, about the same position, and the same background color.
    """
    size, row, column = (choose(rng, tuple(words)) for words in (RADII, ROWS, COLUMNS))
    background = _background(rng, pairs)
    scenes = []
    for pair in pairs:
        radius = rng.uniform(*RADII[size])
        thing = _thing(rng, pair, size, (COLUMNS[column], ROWS[row]), radius, rng.normal(0, TILT))
        scenes.append(_scene(rng, (thing,), background, (row, column)))
    return scenes


def portraits(rng: np.random.Generator, pairs: Sequence[Pair]) -> list[Scene]:
    """Return a scene with one large shape in the center for each pair, on the same background.

    These are the easiest scenes to tell apart.
    """
    background = _background(rng, pairs)
    scenes = []
    for pair in pairs:
        radius = rng.uniform(0.3, 0.42)
        thing = _thing(rng, pair, "large", (0.5, 0.5), radius, rng.normal(0, TILT))
        scenes.append(_scene(rng, (thing,), background))
    return scenes


def couple(rng: np.random.Generator, pairs: tuple[Pair, Pair]) -> Scene:
    """Return a scene with two small or medium shapes, one beside or above the other."""
    ends = (0.25, 0.75) if rng.random() < 0.5 else (0.75, 0.25)
    across = rng.uniform(0.3, 0.7)
    upright = rng.random() < 0.5
    things = []
    for pair, end in zip(pairs, ends, strict=True):
        size = choose(rng, ("small", ""))
        place = (across, end) if upright else (end, across)
        radius = 0.8 * rng.uniform(*RADII[size])  # smaller, so that the two shapes do not touch
        things.append(_thing(rng, pair, size, place, radius, rng.normal(0, TILT)))
    return _scene(rng, tuple(things), _background(rng, pairs))


def swapped_couples(rng: np.random.Generator, pairs: Sequence[Pair]) -> tuple[Scene, Scene]:
    """Return two scenes with the same two shapes and the same two colors, but swapped colors.

    All four pairs of color and shape are in `pairs`.
    """
    while True:
        (colour1, shape1), (colour2, shape2) = (choose(rng, pairs) for _ in range(2))
        swap = ((colour2, shape1), (colour1, shape2))
        if colour1 != colour2 and shape1 != shape2 and all(pair in pairs for pair in swap):
            return couple(rng, ((colour1, shape1), (colour2, shape2))), couple(rng, swap)


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Return a random element of `options`."""
    return options[int(rng.integers(len(options)))]


def _thing(
    rng: np.random.Generator,
    pair: Pair,
    size: str,
    place: tuple[float, float],
    radius: float,
    angle: float,
) -> Thing:
    """Return a shape near a position, moved so that it lies inside the picture."""
    x, y = np.clip(place + rng.uniform(-0.05, 0.05, 2), 0.95 * radius, 1 - 0.95 * radius)
    return Thing(
        colour=pair[0],
        shape=pair[1],
        size=size,
        x=float(x),
        y=float(y),
        radius=radius,
        angle=angle,
        rgb=_paint(rng, pair[0]),
    )


def _background(rng: np.random.Generator, pairs: Sequence[Pair]) -> str:
    """Return a background color that none of the shapes has."""
    taken = {colour for colour, _ in pairs}
    return choose(rng, [colour for colour in BACKGROUND_RANGES if colour not in taken])


def _scene(
    rng: np.random.Generator,
    things: tuple[Thing, ...],
    background: str,
    place: tuple[str, str] = ("", ""),
) -> Scene:
    """Return a scene of `things` on a background with a random gradient and texture."""
    tint = _paint(rng, background)
    return Scene(
        things=things,
        row=place[0],
        column=place[1],
        background=background,
        tints=(tint, _paint(rng, background) if rng.random() < 0.5 else tint),
        slope=rng.uniform(0, 2 * math.pi),
        texture=choose(rng, (0.0, 5.0, 10.0, 15.0)),
        grain=int(rng.integers(6, 49)),
        seed=int(rng.integers(2**31)),
    )


def _paint(rng: np.random.Generator, colour: str) -> RGB:
    """Return a random RGB value, 0..255, of the named color."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in BACKGROUND_RANGES[colour])
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
