"""Decode image files and bytes, within the limits of `serving.limits`.

This module does not know how a model preprocesses images (`serving.inputs.preprocess`).
"""

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from serving.errors import ImageError
from serving.inputs.image_metadata import orientation, pixel_parts
from serving.limits import FORMATS, MAX_IMAGE_BYTES, MAX_PIXELS, MAX_RLE_PIXELS
from serving.util.directories import problem_of

SHRINK = "scale it down or compress it first"
"""Advice for encoded images that are too large."""
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the operation that undoes it; other orientations need none."""
_quiet_lock = threading.Lock()


def read_image(image: str | os.PathLike[str]) -> bytes:
    """Read an encoded image of at most `MAX_IMAGE_BYTES` from the file `image`.

    Raises:
        ImageError: the file does not exist, is not a regular file (a pipe is never opened), empty,
            too large, or unreadable.
    """
    path, name = Path(image), short_path(image)
    if problem := problem_of(path):
        raise ImageError(problem, name=name, advice="give the path of an image")
    try:
        # O_NONBLOCK: opening a pipe that has replaced the file since would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("was replaced while it was opened", name=name)
            size = status.st_size
            # One extra byte detects a file that grows or reports no size, as in /proc.
            data = b"" if size > MAX_IMAGE_BYTES else file.read(MAX_IMAGE_BYTES + 1)
    except ImageError:
        raise
    except OSError as error:  # its text has the whole path
        raise ImageError(f"cannot be read: {error.strerror}", name=name) from error
    if max(size, len(data)) > MAX_IMAGE_BYTES:
        raise ImageError(too_large(max(size, len(data))), name=name, advice=SHRINK)
    if not data:
        raise ImageError("is empty (0 bytes)", name=name, advice="copy or download it again")
    return data


def short_path(path: str | os.PathLike[str]) -> str:
    """Return a path as the name of an image in errors, shortened if it is very long."""
    name = os.fspath(path)
    return name if len(name) <= 500 else f"{name[:200]}...{name[-100:]}"


def too_large(size: int) -> str:
    """Return the reason of the error for an encoded image of `size` bytes."""
    return f"the image has {size} bytes, more than the {MAX_IMAGE_BYTES} allowed"


def decode(data: bytes, *, exif_orientation: bool = False) -> Image.Image:
    """Decode an encoded image, or the first frame of an animation.

    Args:
        data: the content of a file in one of `FORMATS`.
        exif_orientation: rotate and mirror the image as its EXIF orientation says.

    Returns:
        The loaded image in the mode of its file (`RGB`, `L`, `P`, `CMYK`, ...), without metadata.

    Raises:
        ImageError: `data` is empty, of another format, truncated or corrupt, or exceeds a limit.
            Limits are checked before decoding.
    """
    return open_image(data, exif_orientation=exif_orientation).decode()


@dataclass(frozen=True, slots=True)
class Header:
    """An encoded image whose header was read, and whose pixels are not decoded yet."""

    image: Image.Image
    transpose: Image.Transpose | None
    """Operation that undoes the EXIF orientation."""

    @property
    def pixels(self) -> int:
        """Width x height."""
        return self.image.width * self.image.height

    def decode(self) -> Image.Image:
        """Decode the image; see the function `decode`."""
        whole = loaded(self.image)
        return whole if self.transpose is None else whole.transpose(self.transpose)


def open_image(data: bytes, *, exif_orientation: bool = False) -> Header:
    """Read the header of an encoded image.

    Args:
        data: the content of a file in one of `FORMATS`.
        exif_orientation: rotate and mirror the image as its EXIF orientation says.

    Raises:
        ImageError: `data` is empty, of another format, too large, or its header is damaged.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(too_large(len(data)), advice=SHRINK)
    parts = BytesIO(pixel_parts(data))
    try:
        with _quiet():
            image = Image.open(parts, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise _unrecognized(data) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"the image is too large, more than the {MAX_PIXELS} pixels allowed: {error}"
        ) from error
    except Exception as error:  # damaged headers raise many types, such as struct.error
        raise ImageError(f"the image's header is damaged: {error}") from error
    _check_pixels(image)
    return Header(image, _TRANSPOSE.get(orientation(data)) if exif_orientation else None)


def loaded(image: Image.Image) -> Image.Image:
    """Decode the pixels of an opened image, after checking their number.

    Raises:
        ImageError: the image is truncated or corrupt, or exceeds a limit.
    """
    _check_pixels(image)
    width, height = image.size
    tiles = getattr(image, "tile", None)  # parts not yet decoded, each with its decoder's name
    if tiles and tiles[0][0] == "bmp_rle" and width * height > MAX_RLE_PIXELS:
        raise ImageError(
            f"the run-length encoded BMP has {width} x {height} pixels, more than the "
            f"{MAX_RLE_PIXELS} allowed",
            advice="save it as PNG",
        )
    try:
        image.load()
    except Exception as error:  # damaged data raises many types, as damaged headers do
        raise ImageError(
            f"the image is truncated or corrupt ({error})", advice="copy or download it again"
        ) from error
    return image


def _check_pixels(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"the image has {width} x {height} pixels, more than the {MAX_PIXELS} allowed",
            advice="scale it down first",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings about large images, whose size `loaded` checks."""
    # catch_warnings changes the state of the process; interleaved threads would not restore it.
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unrecognized(data: bytes) -> ImageError:
    """Return an error that describes `data`, which is not an image, by its first bytes."""
    expected = f"expected one of {', '.join(FORMATS)}"
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return ImageError(f"{expected}, got 0 bytes")
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return ImageError(
            f"{expected}, got a web page (HTML)", advice="give the address of the image itself"
        )
    if data[4:8] == b"ftyp":
        return ImageError(
            f"{expected}, got HEIC, AVIF or a video", advice="convert it to JPEG or PNG"
        )
    return ImageError(
        f"{expected}, got {len(data)} bytes that start with {data[:16]!r}: another format, "
        "not an image, or only the beginning of one"
    )
