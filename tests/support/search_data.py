"""Directories of images, and search indexes of them."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from serving.bundles.bundle import Bundle
from serving.clients.local import LocalClip
from serving.search.index import Hit, SearchIndex

BAD = {
    "animals/text.jpg": b"this is a text file, renamed .jpg",
    "empty.png": b"",
    "zzz/cut.jpg": None,  # the first half of an image
}


SERVING = (sys.executable, "-m", "serving", "search")


def paint(file: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    file.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((48, 40), Image.Resampling.BICUBIC).save(file)


def fill(folder: Path, count: int, first: int = 0) -> Path:
    names = ("animals/cats/{}.jpg", "animals/{}.png", "{}.jpg", "zoo/über [x] {}.png")
    for number in range(first, first + count):
        paint(folder / names[number % 4].format(f"{number:03d}"), number)
    return folder


def bundle_of(bundle: Bundle) -> tuple[str, str]:
    return "--bundle", str(bundle.path)


class Counting(LocalClip):
    """An embedder that counts the images it embedded."""

    embedded = 0

    def embed_images(self, images):
        embeddings = super().embed_images(images)
        self.embedded += len(embeddings)
        return embeddings


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def paths(path: Path) -> list[str]:
    return [entry.path for entry in SearchIndex.open(path).entries]


def top(cosines, names, count) -> list[Hit]:
    """Brute-force search, one pair at a time."""
    pairs = sorted(zip(-np.asarray(cosines, np.float64), names, strict=True))
    return [Hit(name, -value) for value, name in pairs[:count]]


def same(hits, expected) -> bool:
    assert [hit.path for hit in hits] == [hit.path for hit in expected]
    cosines = [[hit.cosine for hit in side] for side in (hits, expected)]
    np.testing.assert_allclose(*cosines, atol=1e-5)
    return True
