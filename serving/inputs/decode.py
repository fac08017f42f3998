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
from serving.inputs.image_metadata import orientation, pixel_parts
from serving.limits import FORMATS, MAX_IMAGE_BYTES, MAX_PIXELS, MAX_RLE_PIXELS

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
        ImageError: the file does not exist, is a directory, empty, too large, or unreadable.
    """
    path, name = Path(image), short_path(image)
    try:
        if path.is_dir():
            raise ImageError("is a directory", name=name, advice="give the path of an image")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # One extra byte detects a file that grows or reports no size, such as a pipe.
            data = b"" if size > MAX_IMAGE_BYTES else file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError as error:
        raise ImageError("no such file", name=name, advice="give the path of an image") from error
    except ImageError:
        raise
    except ValueError as error:  # a NUL character in the path
        raise ImageError(f"cannot be read: {error}", name=name) from error
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
    whole = loaded(image)
    if exif_orientation and (method := _TRANSPOSE.get(orientation(data))) is not None:
        return whole.transpose(method)
    return whole


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
