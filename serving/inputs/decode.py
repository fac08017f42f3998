"""Decode image files and bytes, within the limits of `serving.limits`.

This module does not know how a model preprocesses images (`serving.inputs.preprocess`).
"""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from serving.errors import ImageError
from serving.inputs.image_metadata import pixel_parts
from serving.limits import FORMATS, MAX_IMAGE_BYTES, MAX_PIXELS, MAX_RLE_PIXELS

_SHRINK = "scale it down or compress it first"
_quiet_lock = threading.Lock()


def read_image(picture: str | os.PathLike[str]) -> bytes:
    """Read an encoded image of at most `MAX_IMAGE_BYTES` from the file `picture`.

    Raises:
        ImageError: the file does not exist, is a directory, empty, too large, or unreadable.
    """
    path = Path(picture)
    try:
        if path.is_dir():
            raise ImageError("is a directory", name=str(path), advice="give the path of an image")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # One extra byte detects a file that grows or reports no size, such as a pipe.
            data = b"" if size > MAX_IMAGE_BYTES else file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError as error:
        raise ImageError(
            "no such file", name=str(path), advice="give the path of an image"
        ) from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise ImageError(f"cannot be read: {error}", name=str(path)) from error
    if max(size, len(data)) > MAX_IMAGE_BYTES:
        raise ImageError(too_large(max(size, len(data))), name=str(path), advice=_SHRINK)
    if not data:
        raise ImageError("is empty (0 bytes)", name=str(path), advice="copy or download it again")
    return data


def too_large(size: int) -> str:
    """Return the reason of the error for an encoded image of `size` bytes."""
    return f"the image has {size} bytes, more than the {MAX_IMAGE_BYTES} allowed"


def decode(data: bytes) -> Image.Image:
    """Decode an encoded image, or the first frame of an animation.

    Args:
        data: the content of a file in one of `FORMATS`.

    Returns:
        The loaded image in the mode of its file (`RGB`, `L`, `P`, `CMYK`, ...), without metadata.

    Raises:
        ImageError: `data` is empty, of another format, truncated or corrupt, or exceeds a limit.
            Limits are checked before decoding.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(too_large(len(data)), advice=_SHRINK)
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
    return loaded(image)


def loaded(image: Image.Image) -> Image.Image:
    """Decode the pixels of an opened image, after checking their number.

    Raises:
        ImageError: the image is truncated or corrupt, or exceeds a limit.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"the image has {width} x {height} pixels, more than the {MAX_PIXELS} allowed",
            advice="scale it down first",
        )
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
