"""Files and bytes -> pictures in memory, within the limits of `serving.limits`.

Does not know: what a model wants of a picture (`preprocess`).
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
from serving.limits import FORMATS, MAX_PICTURE_BYTES, MAX_PIXELS, MAX_RLE_PIXELS

_quiet_lock = threading.Lock()


def read_picture(picture: str | os.PathLike[str]) -> bytes:
    """Reads an encoded picture from a file, unless it is larger than `MAX_PICTURE_BYTES`.

    Raises:
        ImageError: there is no such file, it is a directory, empty, too large, or unreadable.
    """
    path = Path(picture)
    try:
        if path.is_dir():
            raise ImageError("is a directory", name=str(path), advice="give the path of one image")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # One byte more tells of a file that grows, or has no size, such as a pipe.
            data = b"" if size > MAX_PICTURE_BYTES else file.read(MAX_PICTURE_BYTES + 1)
    except FileNotFoundError as error:
        raise ImageError(
            "no such file", name=str(path), advice="give the path of an image"
        ) from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise ImageError(f"cannot be read: {error}", name=str(path)) from error
    if max(size, len(data)) > MAX_PICTURE_BYTES:
        raise ImageError(too_large(max(size, len(data))), name=str(path))
    if not data:
        raise ImageError("is empty (0 bytes)", name=str(path), advice="copy or download it again")
    return data


def too_large(size: int) -> str:
    """Says that `size` bytes are more than an encoded picture may have."""
    return (
        f"the picture has {size} bytes, more than the {MAX_PICTURE_BYTES} allowed; scale it down "
        "or compress it first"
    )


def decode(data: bytes) -> Image.Image:
    """Decodes an encoded picture; of an animation, the first frame.

    Args:
        data: the content of a file in one of `FORMATS`.

    Returns:
        The picture, loaded, in the mode its file has (`RGB`, `L`, `P`, `CMYK`, ...), without
        metadata.

    Raises:
        ImageError: `data` is empty, of another format, truncated or corrupt, or over a limit; the
            last is found before anything is decoded.
    """
    if len(data) > MAX_PICTURE_BYTES:
        raise ImageError(too_large(len(data)))
    parts = BytesIO(pixel_parts(data))
    try:
        with _quiet():
            image = Image.open(parts, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(_not_a_picture(data)) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"the picture is too large, more than the {MAX_PIXELS} pixels allowed: {error}"
        ) from error
    except Exception as error:  # damaged headers raise nearly anything, down to struct.error
        raise ImageError(f"the picture's header is damaged: {error}") from error
    return loaded(image)


def loaded(image: Image.Image) -> Image.Image:
    """Decodes the pixels of an opened picture, unless they are too many.

    Raises:
        ImageError: see `decode`.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"the picture has {width} x {height} pixels, more than the {MAX_PIXELS} allowed; "
            "scale it down first"
        )
    tiles = getattr(image, "tile", None)  # what is still to be decoded, and by what
    if tiles and tiles[0][0] == "bmp_rle" and width * height > MAX_RLE_PIXELS:
        raise ImageError(
            f"the run-length encoded BMP has {width} x {height} pixels, more than the "
            f"{MAX_RLE_PIXELS} allowed; save it as PNG"
        )
    try:
        image.load()
    except Exception as error:  # damaged data raises nearly anything, as damaged headers do
        raise ImageError(
            f"the picture is truncated or corrupt ({error}); copy or download it again"
        ) from error
    return image


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Pillow's warnings about sizes that it lets pass and we do not."""
    # catch_warnings changes the whole process; two threads that interleave would leave it changed.
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _not_a_picture(data: bytes) -> str:
    """Says what arrived instead of a picture, as far as its first bytes tell."""
    expected = f"expected one of {', '.join(FORMATS)}"
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return f"{expected}, got 0 bytes"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return f"{expected}, got a web page (HTML); give the address of the picture itself"
    if data[4:8] == b"ftyp":
        return f"{expected}, got HEIC, AVIF or a video; convert it to JPEG or PNG"
    return (
        f"{expected}, got {len(data)} bytes that start with {data[:16]!r}: another format, "
        "not a picture, or only the beginning of one"
    )
