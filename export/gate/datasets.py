"""Batches for the parity gate, for INT8 calibration and for zero-shot accuracy.

This module only makes the batches. Their consumers are `export.gate.parity` and `export.int8`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.bundles.manifest import ImageSpec, TextSpec, Tower
from serving.errors import ImageError, InputError
from serving.inputs.preprocess import preprocess
from serving.inputs.tokenizer import Tokenizer
from serving.runners.base import Batch
from serving.util.directories import SUFFIXES, described, find_images, read_captions, read_lines

CALIBRATION_IMAGES = 256
CALIBRATION_TEXTS = 512

_BATCH = 16
_IMAGE_BATCHES = (1, 2, 5, 8)
_TEXT_BATCHES = (1, 3, 8)
_PROMPTS = 8
_SEED = 1000
"""Seed of synthetic calibration data. It differs from the seeds of the parity gate's probes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Data that an export calibrates with and measures accuracy on."""

    calibration: dict[Tower, list[Batch]]
    source: str
    """Description of the calibration data, for the manifest."""
    labelled: "Labelled | None"
    skipped: tuple[str, ...] = ()
    """Images that could not be read, each with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Labeled images, for zero-shot accuracy."""

    images: list[Batch]
    texts: list[Batch]
    """Token ids of every label in every prompt template, label by label."""
    templates: int
    """Number of prompt templates, and so of texts per label."""
    truth: NDArray[np.intp]
    """Label index of each image."""


def load_data(
    image: ImageSpec,
    tokenizer: Tokenizer,
    templates: Sequence[str],
    text: TextSpec,
    *,
    pictures: Path | None = None,
    captions: Path | None = None,
    labelled: Path | None = None,
    progress: Callable[[str], None],
) -> Data:
    """Read the user's data. Without `pictures` or `captions`, use synthetic probes instead.

    Args:
        image: preprocessing of the image tower.
        tokenizer: tokenizer of the text tower.
        templates: prompt templates that labels are put into.
        text: token ids and lengths of the text tower.
        pictures: directory of representative images.
        captions: text file with one caption per line, or with one `file, caption` per line.
        labelled: directory of images with a `captions.txt`. A `labels.txt` in it lists the captions
            that are labels; without it, every caption is a label.
        progress: called with each step.

    Raises:
        InputError: a directory has no readable image, or a file is not UTF-8.
    """
    skipped: list[str] = []
    sources = []
    images: list[Batch] = [probe_images(image, 8, _SEED + n) for n in range(4)]
    if pictures is not None:
        progress(f"reading images of {pictures}")
        found = _found(pictures, skipped, progress)
        # Evenly spaced, because directories are often sorted by the content of the images.
        spaced = found[:: -(-len(found) // CALIBRATION_IMAGES)]
        images = _batches(image, spaced, skipped)
        if not images:
            raise InputError(f"{pictures}: none of its images can be read; first {skipped[0]}")
        sources.append(f"{sum(map(len, images))} images of {pictures.name}")
    texts: list[Batch] = [
        probe_texts(text, 8, length, _SEED + n) for length in text.buckets for n in range(2)
    ]
    if captions is not None:
        lines = [_caption(line) for line in read_lines(captions)][:CALIBRATION_TEXTS]
        if not lines:
            raise InputError(f"{captions} has no captions; expected one per line")
        chunks = range(0, len(lines), _BATCH)
        texts = [tokenizer(lines[i : i + _BATCH], truncate=True) for i in chunks]
        sources.append(f"{len(lines)} captions of {captions.name}")
    return Data(
        calibration={"image": images, "text": texts},
        source=", ".join(sources) or "synthetic probes",
        labelled=_read_labelled(image, tokenizer, templates, labelled, skipped, progress),
        skipped=tuple(skipped),
    )


def _found(directory: Path, skipped: list[str], progress: Callable[[str], None]) -> list[Path]:
    """Return the images of a directory; report files that are not images or cannot be read."""
    found = find_images(directory)
    skipped += [f"{item.path}: {item.reason}" for item in found.skipped]
    if found.ignored:
        progress(f"ignored {described(found.ignored)} in {directory}")
    return found.files


def _caption(line: str) -> str:
    """Return the caption of a line, without a leading image file name and comma."""
    name, comma, caption = line.partition(",")
    return caption.strip() if comma and Path(name).suffix.lower() in SUFFIXES else line


def _batches(
    spec: ImageSpec, files: Sequence[Path], skipped: list[str], kept: list[Path] | None = None
) -> list[Batch]:
    pixels = []
    for file in files:
        try:
            pixels.append(preprocess(file, spec))
        except ImageError as error:
            skipped.append(str(error.within(file.name)))
            continue
        if kept is not None:
            kept.append(file)
    return [np.stack(pixels[i : i + _BATCH]) for i in range(0, len(pixels), _BATCH)]


def _read_labelled(
    spec: ImageSpec,
    tokenizer: Tokenizer,
    templates: Sequence[str],
    directory: Path | None,
    skipped: list[str],
    progress: Callable[[str], None],
) -> Labelled | None:
    if directory is None:
        return None
    progress(f"reading labeled images of {directory}")
    captions = read_captions(directory)
    found = _found(directory, skipped, progress)
    listed = directory / "labels.txt"
    labels = read_lines(listed) if listed.exists() else sorted(set(captions.values()))
    files = [file for file in found if captions.get(file.name) in labels]
    if not files:
        raise InputError(
            f"{directory}: no image has one of its {len(labels)} labels as its caption; expected "
            "captions.txt with one `file, label` per line"
        )
    kept: list[Path] = []
    images = _batches(spec, files, skipped, kept)
    if not images:
        raise InputError(
            f"{directory}: none of its images can be read; first {skipped[-len(files)]}"
        )
    texts = [template.replace("{}", label) for label in labels for template in templates]
    ids = tokenizer(texts, truncate=True)
    return Labelled(
        images=images,
        texts=[ids[i : i + 4 * _BATCH] for i in range(0, len(ids), 4 * _BATCH)],
        templates=len(templates),
        truth=np.array([labels.index(captions[file.name]) for file in kept]),
    )


def probe_images(spec: ImageSpec, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return `count` synthetic images, uint8 [count, 3, size, size].

    Each is a coarse grid of random colors, enlarged to the size of the tower's input, with its own
    coarseness, contrast and noise. Pure noise would get nearly the same embedding every time.
    """
    rng = np.random.default_rng(seed)
    images = np.empty((count, 3, spec.size, spec.size), np.uint8)
    for index in range(count):
        cells = int(rng.integers(2, 24))
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = np.asarray(grid.resize((spec.size, spec.size), Image.Resampling.BICUBIC), float)
        noisy = smooth * rng.uniform(0.3, 1) + rng.normal(0, rng.uniform(0, 40), smooth.shape)
        images[index] = np.clip(noisy, 0, 255).astype(np.uint8).transpose(2, 0, 1)
    return images


def probe_texts(spec: TextSpec, count: int, length: int, seed: int = 0) -> NDArray[np.int32]:
    """Return `count` synthetic texts, token ids int32 [count, length].

    A text is the start token, random tokens, the end token at a random position, and padding.
    """
    rng = np.random.default_rng((seed, length))
    ids = np.full((count, length), spec.pad_id, np.int32)
    for row in ids:
        end = int(rng.integers(1, length))
        row[:end] = rng.integers(0, min(spec.start_id, spec.end_id), end)
        row[0], row[end] = spec.start_id, spec.end_id
    return ids


def probe_prompts(spec: TextSpec, count: int, length: int, seed: int = 0) -> NDArray[np.int32]:
    """Return texts as `probe_texts` does, but each shares a prefix with an earlier one.

    Prompts that put labels into the same templates share prefixes in this way.
    """
    rng, ids = np.random.default_rng((seed, length)), probe_texts(spec, count, length, seed)
    ends = (ids == spec.end_id).argmax(axis=1)
    for row in range(1, count):
        other = int(rng.integers(row))
        shared = int(rng.integers(1, min(ends[row], ends[other]) + 1))
        ids[row, :shared] = ids[other, :shared]
    return ids


def probes(tower: Tower, image: ImageSpec, text: TextSpec, seed: int = 0) -> Iterator[Batch]:
    """Yield the parity gate's batches for a tower, in several batch sizes.

    Texts come in every bucket's length and in the minimum length of 2 tokens. The last batch has
    texts with shared prefixes, which the prefix-tree graph must embed separately.
    """
    if tower == "image":
        for size in _IMAGE_BATCHES:
            yield probe_images(image, size, seed + size)
    else:
        for length in (2, *text.buckets):
            for size in _TEXT_BATCHES:
                yield probe_texts(text, size, length, seed + size)
        yield probe_prompts(text, _PROMPTS, text.buckets[len(text.buckets) // 3], seed)
