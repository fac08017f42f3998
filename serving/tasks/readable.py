"""Run a model on many images in batches, and optionally leave out those that cannot be used.

All commands that skip bad images do so with `in_batches` or `readable_parts`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from serving.errors import ImageError
from serving.inputs.images import ImageInput, Images, each_image
from serving.tasks.embedder import Floats
from serving.util.progress import Progress, silent

Errors = dict[int, ImageError]
"""Errors of images, by the index of the image."""


def readable_parts(
    run: Callable[[Sequence[ImageInput]], Floats],
    images: Sequence[ImageInput],
    errors: Errors | None,
) -> list[Floats]:
    """Call `run` on images, and again without each image that it cannot use.

    Args:
        run: returns one row per image, or raises an `ImageError` with the index of an image.
        images: any number of images.
        errors: receives the error of each image that is left out. None: errors are raised.

    Returns:
        The rows of the other images, in parts, in their order.

    Raises:
        ImageError: an image cannot be used and `errors` is None, or the error names no image.
    """
    if errors is None:
        return [run(images)]
    parts: dict[int, Floats] = {}
    waiting = [(0, len(images))]
    while waiting:
        start, stop = waiting.pop()
        if start == stop:
            continue
        try:
            parts[start] = run(images[start:stop])
        except ImageError as error:
            if error.index is None:
                raise
            bad = start + error.index
            errors[bad] = error.shifted(start)
            waiting += [(start, bad), (bad + 1, stop)]
    return [parts[start] for start in sorted(parts)]


def in_batches(
    run: Callable[[Sequence[ImageInput]], Floats],
    images: Images,
    size: int,
    errors: Errors | None = None,
    *,
    step: str = "",
    progress: Progress = silent,
) -> Iterator[Floats]:
    """Yield the results of `run` for `size` images at a time; see `readable_parts`.

    Indices of errors are those within all `images`.

    Args:
        run: see `readable_parts`.
        images: any number of images.
        size: maximum number of images per call.
        errors: see `readable_parts`.
        step: text for `progress`.
        progress: receives the number of images before each batch, and at the end.
    """
    total = len(images) if isinstance(images, Sequence) and not isinstance(images, str) else 0
    source, start = each_image(images), 0
    while batch := list(itertools.islice(source, size)):
        progress(step, start, total)
        found: Errors | None = None if errors is None else {}
        try:
            parts = readable_parts(run, batch, found)
        except ImageError as error:
            raise error.shifted(start) from error
        if errors is not None and found is not None:
            errors |= {start + index: error.shifted(start) for index, error in found.items()}
        if parts:
            yield np.concatenate(parts)
        start += len(batch)
    if start:
        progress(step, start, total)


def all_in_batches(
    run: Callable[[Sequence[ImageInput]], Floats],
    images: Images,
    size: int,
    errors: Errors | None = None,
    *,
    width: int,
    step: str = "",
    progress: Progress = silent,
) -> Floats:
    """Return the results of `in_batches` as one array.

    Args:
        run, images, size, errors, step, progress: see `in_batches`.
        width: number of columns of the result, which is empty if there are no images.

    Raises:
        ImageError: there are images but none can be used, or see `in_batches`.
    """
    parts = list(in_batches(run, images, size, errors, step=step, progress=progress))
    if errors and not parts:
        raise none_usable(errors)
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)


def none_usable(errors: Errors) -> ImageError:
    """Return the error of a command none of whose images can be used."""
    first = errors[min(errors)]
    place = f"{first.name}: " if first.name else ""
    return ImageError(
        f"none of the {len(errors)} images can be used, such as {place}{first.reason}",
        advice=first.advice,
    )
