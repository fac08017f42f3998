"""The data set of drawings: deterministic, with true captions, and without held-out pairs."""

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from serving.errors import InputError
from training import shapes
from training.demo import IMAGE
from training.pool import CHUNK, KINDS, draw_pool
from training.scenes import Scene, couple, portraits, single


def scenes(kind: str, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scene for _ in range(count) for scene in KINDS[kind].scenes(rng)]


def test_held_out_pairs_leave_every_word_in_training() -> None:
    assert 10 <= len(shapes.HELD_OUT) <= 15
    assert set(shapes.HELD_OUT) < set(shapes.PAIRS)
    assert set(shapes.SEEN) == set(shapes.PAIRS) - set(shapes.HELD_OUT)
    for part in zip(*shapes.HELD_OUT, strict=True):
        assert max(Counter(part).values()) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_pairs_are_neither_drawn_nor_described(kind: str) -> None:
    rng = np.random.default_rng(1)
    names = [" ".join(pair) for pair in shapes.HELD_OUT]
    drawn = set()
    for scene in scenes(kind, 1500):
        drawn |= {(thing.colour, thing.shape) for thing in scene.things}
        text = KINDS[kind].describe(scene, rng)
        assert not any(name in text for name in names), text
    assert drawn == set(shapes.SEEN)


def test_couples_are_followed_by_their_colors_swapped() -> None:
    pairs = scenes("couple", 50)
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        assert [t.shape for t in one.things] == [t.shape for t in other.things]
        assert [t.colour for t in one.things] == [t.colour for t in other.things][::-1]


def test_captions_are_true() -> None:
    rng = np.random.default_rng(2)
    for scene in scenes("couple", 300) + scenes("single", 300):
        text = shapes.caption(scene, rng)
        if match := re.search(r"(\w+) background", text):
            assert match[1] == scene.background
        if match := re.search(
            r"(\w+) (\w+) (to the left of|above) an? (?:small )?(\w+) (\w+)", text
        ):
            by_pair = {(t.colour, t.shape): t for t in scene.things}
            one, other = by_pair[match[1], match[2]], by_pair[match[4], match[5]]
            assert one.x < other.x if "left" in match[3] else one.y < other.y
        if "top" in text:
            assert scene.things[0].y < 0.4
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_drawing_is_deterministic_and_the_same_at_every_size() -> None:
    for kind in KINDS:
        for scene in scenes(kind, 5):
            small, again, large = (shapes.draw(scene, size) for size in (64, 64, 256))
            assert small.mode == "RGB"
            assert small.size == (64, 64)
            assert small.tobytes() == again.tobytes()
            shrunk = large.resize((64, 64), Image.Resampling.BICUBIC)
            difference = np.abs(np.asarray(small, float) - np.asarray(shrunk, float))
            assert difference.mean() < 8


def test_shape_has_its_named_color() -> None:
    rng = np.random.default_rng(3)
    for pair in shapes.PAIRS:
        (scene,) = portraits(rng, [(pair[0], "circle")])
        thing = scene.things[0]
        centre = shapes.draw(scene, 100).getpixel((round(100 * thing.x), round(100 * thing.y)))
        assert isinstance(centre, tuple)
        assert np.abs(np.subtract(centre, thing.rgb)).max() < 40
        assert scene.background != pair[0]


def test_the_pool_does_not_depend_on_the_number_of_processes() -> None:
    one, two = (draw_pool({"couple": CHUNK + 1}, IMAGE, 5, n)["couple"] for n in (1, 2))
    assert one.pixels.shape == (2 * CHUNK, 3, 64, 64)
    assert one.pixels.tobytes() == two.pixels.tobytes()
    assert one.captions == two.captions


def test_labeled_drawings_cover_all_pairs() -> None:
    drawn = list(shapes.draw_labelled(seed=1, count=200, size=32))
    assert Counter(text for _, text in drawn) == {shapes.label(p): 2 for p in shapes.PAIRS}
    again = list(shapes.draw_labelled(seed=1, count=200, size=32))
    assert all(a[0].tobytes() == b[0].tobytes() for a, b in zip(drawn, again, strict=True))
    other = next(shapes.draw_labelled(seed=2, count=1, size=32))[0]
    assert other.tobytes() != drawn[0][0].tobytes()


def test_written_directory_matches_its_listing(tmp_path) -> None:
    written = shapes.write_folder(tmp_path / "new", count=12, seed=3, size=48)
    lines = (tmp_path / "new" / "captions.txt").read_text().splitlines()
    assert lines == [f"{path.name}, {text}" for path, text in written]
    for path, _ in written:
        with Image.open(path) as picture:
            assert picture.format == ("PNG" if path.suffix == ".png" else "JPEG")
            assert picture.size == (48, 48)
    with pytest.raises(InputError, match=r"captions\.txt exists already"):
        shapes.write_folder(tmp_path / "new", count=1, seed=3, size=48)


def test_two_shapes_do_not_hide_each_other() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        one, other = couple(rng, (("red", "square"), ("blue", "ring"))).things
        distance = np.hypot(one.x - other.x, one.y - other.y)
        assert distance > 0.9 * max(one.radius, other.radius)


def test_shapes_lie_inside_the_image() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        (thing,) = single(rng, ("red", "square")).things
        assert 0.9 * thing.radius <= thing.x <= 1 - 0.9 * thing.radius
        assert 0.9 * thing.radius <= thing.y <= 1 - 0.9 * thing.radius


def test_drawing_does_not_load_torch() -> None:
    code = "import sys, training.pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
