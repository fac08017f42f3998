"""The batches models are probed with, INT8 ranges are measured on, and accuracy is judged by.

Does not know: what is done with the batches.
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
from serving.util.directories import SUFFIXES, find_images, read_captions, read_lines

CALIBRATION_IMAGES = 256
CALIBRATION_TEXTS = 512

_BATCH = 16
_IMAGE_BATCHES = (1, 2, 5, 8)
_TEXT_BATCHES = (1, 3, 8)
_PROMPTS = 8
_SEED = 1000
"""Of what INT8 is calibrated on: not the pictures and texts that it is then judged by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What an export knows of the data its model will see."""

    calibration: dict[Tower, list[Batch]]
    source: str
    """For people: where the calibration batches come from."""
    labelled: "Labelled | None"
    skipped: tuple[str, ...] = ()
    """Pictures that could not be read, each with its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Pictures with labels, to measure zero-shot accuracy on."""

    images: list[Batch]
    texts: list[Batch]
    """Token ids of every label in every template, label by label."""
    templates: int
    """How many texts a label has."""
    truth: NDArray[np.intp]
    """For each picture, the number of its label."""


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
    """Read the folders a user gave, or fall back on probes.

    Args:
        pictures: a folder of pictures like those the model will see.
        captions: a text file, a caption a line, or `captions.txt` (`file, caption` a line).
        labelled: a folder of pictures with `captions.txt`, and `labels.txt` where the captions
            that are labels are listed; without it every caption is a label.

    Raises:
        InputError: a folder holds no picture that can be read, or a file is not UTF-8.
    """
    skipped: list[str] = []
    sources = []
    images: list[Batch] = [probe_images(image, 8, _SEED + n) for n in range(4)]
    if pictures is not None:
        progress(f"reading pictures of {pictures}")
        found = find_images(pictures)
        # Evenly spaced: folders are often sorted by what the pictures show.
        spaced = found[:: -(-len(found) // CALIBRATION_IMAGES)]
        images = _batches(image, spaced, skipped)
        if not images:
            raise InputError(f"{pictures}: none of its pictures can be read; first {skipped[0]}")
        sources.append(f"{sum(map(len, images))} pictures of {pictures.name}")
    texts: list[Batch] = [
        probe_texts(text, 8, length, _SEED + n) for length in text.buckets for n in range(2)
    ]
    if captions is not None:
        lines = [_caption(line) for line in read_lines(captions)][:CALIBRATION_TEXTS]
        if not lines:
            raise InputError(f"{captions} holds no captions; expected one a line")
        chunks = range(0, len(lines), _BATCH)
        texts = [tokenizer(lines[i : i + _BATCH], truncate=True) for i in chunks]
        sources.append(f"{len(lines)} captions of {captions.name}")
    return Data(
        calibration={"image": images, "text": texts},
        source=", ".join(sources) or "synthetic probes",
        labelled=_read_labelled(image, tokenizer, templates, labelled, skipped, progress),
        skipped=tuple(skipped),
    )


def _caption(line: str) -> str:
    """The caption of a line, which may start with a picture's file name and a comma."""
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
    folder: Path | None,
    skipped: list[str],
    progress: Callable[[str], None],
) -> Labelled | None:
    if folder is None:
        return None
    progress(f"reading labelled pictures of {folder}")
    captions = read_captions(folder)
    listed = folder / "labels.txt"
    labels = read_lines(listed) if listed.exists() else sorted(set(captions.values()))
    files = [file for file in find_images(folder) if captions.get(file.name) in labels]
    if not files:
        raise InputError(
            f"{folder}: no picture has one of its {len(labels)} labels as caption; expected "
            "captions.txt with `file, label` a line"
        )
    kept: list[Path] = []
    images = _batches(spec, files, skipped, kept)
    if not images:
        raise InputError(
            f"{folder}: none of its pictures can be read; first {skipped[-len(files)]}"
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


def probe_prompts(spec: TextSpec, count: int, length: int, seed: int = 0) -> NDArray[np.int32]:
    """As `probe_texts`, but each begins as one before it does, as labels in templates do."""
    rng, ids = np.random.default_rng((seed, length)), probe_texts(spec, count, length, seed)
    ends = (ids == spec.end_id).argmax(axis=1)
    for row in range(1, count):
        other = int(rng.integers(row))
        shared = int(rng.integers(1, min(ends[row], ends[other]) + 1))
        ids[row, :shared] = ids[other, :shared]
    return ids


def probes(tower: Tower, image: ImageSpec, text: TextSpec, seed: int = 0) -> Iterator[Batch]:
    """Batches of several sizes and, for text, of every bucket and the shortest length there is;
    and texts that begin alike, which the text tower's tree graph must keep apart.
    """
    if tower == "image":
        for size in _IMAGE_BATCHES:
            yield probe_images(image, size, seed + size)
    else:
        for length in (2, *text.buckets):
            for size in _TEXT_BATCHES:
                yield probe_texts(text, size, length, seed + size)
        yield probe_prompts(text, _PROMPTS, text.buckets[len(text.buckets) // 3], seed)
