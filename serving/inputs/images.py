"""Conversion of images in the forms that people have to encoded bytes or PIL images.

Both clients and bulk embedding convert their images here. `each_image` iterates over an argument,
which may be one image; `opened` reads one image. Neither knows how a model preprocesses images
(`serving.inputs.preprocess`).
"""

import base64
import binascii
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.errors import ImageError, excerpt
from serving.inputs.decode import SHRINK, loaded, read_image, short_path, too_large
from serving.limits import MAX_IMAGE_BYTES


@runtime_checkable
class BinaryFile(Protocol):
    """File opened in binary mode, `io.BytesIO`, or another object with this method."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes."""


@runtime_checkable
class ArrayLike(Protocol):
    """Object that NumPy converts to an array, such as a torch tensor or a pandas column."""

    def __array__(self) -> NDArray[Any]:
        """Return the content as an array."""


ImageInput: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryFile
    | Image.Image
    | NDArray[Any]
    | ArrayLike
    | ImageError
)
"""An image. A str is a path, a data URI, base64, or a URL if there is a `Fetch` function; bytes and
files hold an encoded image; an array is uint8, [height, width] gray or [height, width, 1, 3 or 4]
gray, RGB or RGBA. A file that can seek is read from its beginning. An `ImageError` stands for an
image that could not be read; `opened` raises it."""

Images: TypeAlias = ImageInput | Iterable[ImageInput]
"""One image, or an iterable of images: a list, a generator, a column of a table, an array of str,
or an array uint8 [n, height, width, channels]."""

Fetch: TypeAlias = Callable[[str], bytes]
"""Function that downloads an image: from a URL to the encoded image."""

_CHANNELS = (1, 3, 4)
_LONGEST_PATH = 4096
"""Maximum length of a path on Linux, in bytes (PATH_MAX)."""
_SHORTEST_BASE64 = 64
"""No image is shorter than this in base64. Excludes names such as `QkQ`, which decode to `BM`."""
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM")
"""First bytes of the formats that are decoded."""
_URL = re.compile(r"https?://", re.IGNORECASE)
_DATA = re.compile(r"data:", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")


@dataclass(frozen=True, slots=True)
class Opened:
    """An image after it was read."""

    content: bytes | Image.Image
    """The encoded image, or its pixels."""
    name: str | None = None
    """Name of the image in errors: its path or URL."""


def each_image(images: Images) -> Iterator[ImageInput]:
    """Yield the images of an argument, which may be one image.

    Images are taken from an iterator only when they are needed. Files are read at once, because
    they are often closed before the next image is taken; images of other iterables than sequences
    are copied, because the iterator may use their memory again.

    Yields:
        The images. One that cannot be read is yielded as an `ImageError`, so that errors come in
        the order of the images.

    Raises:
        ImageError: `images` is neither an image nor an iterable of them.
    """
    if not _is_image(images) and isinstance(images, ArrayLike):
        images = _as_array(images)
    if isinstance(images, np.ndarray):
        images = _items_of(images)
    if isinstance(images, Mapping | AbstractSet):
        raise ImageError(
            f"expected images in an order, got a {type(images).__name__}",
            advice="pass a list, such as list(images.values())",
        )
    if _is_image(images):
        yield _held(images, lasting=True)
    elif isinstance(images, Iterable):
        lasting = isinstance(images, Sequence)
        for image in images:
            yield _held(image, lasting=lasting)
    else:
        raise _not_an_image(images)


def opened(image: ImageInput, fetch: Fetch | None = None) -> Opened:
    """Read an image: its encoded bytes, or its pixels if it is a PIL image or an array.

    Args:
        image: an image.
        fetch: downloads http:// and https:// URLs.

    Raises:
        ImageError: the image cannot be read, or is too large.
    """
    match image:
        case ImageError():
            raise image
        case bytes() | bytearray() | memoryview():
            return Opened(_bytes(image))
        case str():
            return _of_text(image, fetch)
        case os.PathLike():
            return Opened(read_image(image), short_path(image))
        case Image.Image():
            return Opened(image)
        case BinaryFile():
            return Opened(_read(image))
        case ArrayLike():
            return Opened(_of_array(_as_array(image)))
    raise _not_an_image(image)


def _is_image(value: object) -> bool:
    kinds = str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, BinaryFile
    return isinstance(value, kinds)


def _held(image: Any, *, lasting: bool) -> ImageInput:
    """Return the image in a form that stays valid when the next image is taken."""
    try:
        if isinstance(image, Image.Image):
            return loaded(image)  # also because threads must not load one image concurrently
        if isinstance(image, BinaryFile) and not isinstance(image, os.PathLike):
            return _read(image)
        if not lasting and isinstance(image, bytearray | memoryview):
            return _bytes(image)
        if not lasting and isinstance(image, ArrayLike):
            return _as_array(image).copy()
    except ImageError as error:
        return error
    result: ImageInput = image
    return result


def _items_of(array: NDArray[Any]) -> Any:
    """Return an array of strings or objects as a list, and a batch of images as its images."""
    if array.dtype.kind == "S":
        raise ImageError(
            "expected images, got a NumPy array of bytes, which drops zeros at the end of each",
            advice="pass a list of bytes, or an array with dtype=object",
        )
    if array.dtype.kind in "OUT":
        if array.ndim > 1:
            raise ImageError(
                f"expected one column of images, got an array {array.dtype} {list(array.shape)}",
                advice="pass one column",
            )
        return array.tolist()
    return list(array) if array.ndim == 4 else array


def _as_array(image: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(image)
    except Exception as error:  # torch raises several types: on another device, with gradients
        raise ImageError(
            f"a {type(image).__name__} cannot be converted to a NumPy array ({error})",
            advice="for a torch tensor, pass tensor.detach().cpu().numpy()",
        ) from error


def _of_array(array: NDArray[Any]) -> Image.Image:
    shape = list(array.shape)
    if array.dtype == np.uint8 and len(shape) == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and shape[2] in _CHANNELS)):
        return Image.fromarray(array)
    advice = "give gray, RGB or RGBA values from 0 to 255, with the channels last"
    if array.dtype.kind == "f":
        advice = (
            "undo any normalization, multiply values from 0 to 1 by 255, round, convert to uint8, "
            "and move the channels to the end"
        )
    elif len(shape) == 3 and shape[0] in _CHANNELS:
        advice = "move the channels to the end, as numpy.moveaxis(image, 0, -1) does"
    raise ImageError(
        "expected an array uint8 [height, width] or [height, width, 1, 3 or 4], got "
        f"{array.dtype} {shape}",
        advice=advice,
    )


def _of_text(text: str, fetch: Fetch | None) -> Opened:
    """Read the image that a str names or contains."""
    if _DATA.match(text):
        return Opened(_of_data_uri(text))
    if _URL.match(text):
        return Opened(_fetched(text, fetch), short_path(text))
    if not text:
        raise ImageError("the path is empty", advice="give the path of an image")
    is_path = len(text) <= _LONGEST_PATH and os.path.exists(text)  # noqa: PTH110  accepts NUL
    if not is_path and len(text) >= _SHORTEST_BASE64 and _is_base64(text):
        return Opened(_of_base64(text))
    if len(text) > _LONGEST_PATH:
        raise ImageError(
            f"expected a path, a data URI or base64 of an image, got a str of {len(text)} "
            f"characters: {excerpt(text)}"
        )
    return Opened(read_image(text), short_path(text))


def _fetched(url: str, fetch: Fetch | None) -> bytes:
    if fetch is None:
        raise ImageError(
            f"expected an image, got the URL {excerpt(url)}, and URLs are not downloaded by "
            "default",
            advice="download it, or give the client a function that does: fetch=",
        )
    try:
        data = fetch(url)
    except Exception as error:  # of any HTTP library
        raise ImageError(
            f"fetch failed with {type(error).__name__}: {excerpt(str(error), 200)}",
            name=short_path(url),
        ) from error
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError(
            f"expected fetch to return bytes, got {type(data).__name__}", name=short_path(url)
        )
    return _bytes(data)


def _of_data_uri(text: str) -> bytes:
    _check_text_size(text)
    head, comma, payload = text.partition(",")
    if not comma:
        raise ImageError(
            f"the data URI has no comma: {excerpt(text)}", advice="give data:image/png;base64,..."
        )
    if not head.lower().rstrip().endswith(";base64"):
        return _bytes(unquote_to_bytes(payload))
    return _of_base64(unquote_to_bytes(payload).decode("latin-1") if "%" in payload else payload)


def _is_base64(text: str) -> bool:
    """Return whether a str begins like the base64 of an image."""
    try:
        head = base64.b64decode(text[:16].translate(_URL_SAFE), validate=True)
    except ValueError:  # including binascii.Error
        return False
    return head.startswith(_SIGNATURES)


def _of_base64(text: str) -> bytes:
    _check_text_size(text)
    packed = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
    try:
        return _bytes(base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True))
    except (binascii.Error, ValueError) as error:  # ValueError: characters that are not ASCII
        raise ImageError(
            f"the base64 text is damaged ({error}): {excerpt(text)}", advice="encode it again"
        ) from error


def _check_text_size(text: str) -> None:
    """Check the size of an image in base64, or percent-encoded, before it is decoded."""
    if len(text) > 4 * MAX_IMAGE_BYTES:
        raise ImageError(
            f"expected a data URI or base64 of at most {MAX_IMAGE_BYTES} bytes, got "
            f"{len(text)} characters: {excerpt(text)}",
            advice=SHRINK,
        )


def _read(file: BinaryFile) -> bytes:
    """Read a file, from its beginning if it can seek."""
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)  # type: ignore[attr-defined]
        data = file.read(MAX_IMAGE_BYTES + 1)
    except Exception as error:  # of any class that resembles a file
        raise ImageError(
            f"a {type(file).__name__} cannot be read ({type(error).__name__}: "
            f"{excerpt(str(error), 200)})",
            advice="give an open file in binary mode",
        ) from error
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError(
            f"expected bytes from a {type(file).__name__}, got {type(data).__name__}",
            advice="open the file in binary mode, open(path, 'rb')",
        )
    return _bytes(data)


def _bytes(data: bytes | bytearray | memoryview) -> bytes:
    """Return encoded bytes of at most `MAX_IMAGE_BYTES`."""
    size = memoryview(data).nbytes
    if size > MAX_IMAGE_BYTES:
        raise ImageError(too_large(size), advice=SHRINK)
    return bytes(data)


def _not_an_image(value: object) -> ImageError:
    return ImageError(
        "expected a path, encoded bytes, a binary file, a PIL image or an array, got "
        f"{type(value).__name__}"
    )
