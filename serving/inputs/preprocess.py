"""Preprocess images to uint8 pixels, as the model's own reference pipeline does.

Scaling to 0..1, mean and standard deviation are not applied here: they are part of the image graph.

There are two reference pipelines (`ImageSpec.pipeline`), which differ in more than the order of
their steps:

- `openai`: torchvision's `Resize`, `CenterCrop`, then `image.convert("RGB")`, as in
  `clip/clip.py:_transform` and OpenCLIP. Transparency is dropped. Palette and 1-bit images are
  resized by nearest neighbor, as Pillow does for those modes.
- `huggingface`: transformers' `CLIPImageProcessorPil`, which first converts to RGB, with
  transparency composited onto white, and then resizes and crops.

Both ignore EXIF orientation, and both clip the values of 16-bit grayscale images at 255 instead of
scaling them. So does this module, unless `ImageSpec.exif_orientation` or `ImageSpec.scale_16_bit`
is set.
"""

import math
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from serving.bundles.manifest import ImageSpec
from serving.errors import BundleError, ImageError
from serving.inputs.decode import decode, loaded
from serving.inputs.images import Fetch, ImageInput, Opened, opened
from serving.limits import MAX_WHOLE_PIXELS

_FILTER_RADIUS = 3
"""Radius of the widest filter, Lanczos, in pixels of source or result, whichever is coarser."""

_EXACT_STEPS = 1 << 20
"""Largest crop offset for which nearest neighbor accumulates positions exactly as Pillow does."""


def preprocess(image: ImageInput, spec: ImageSpec, fetch: Fetch | None = None) -> NDArray[np.uint8]:
    """Convert an image in any form of `ImageInput` to the input of the image tower.

    Args:
        image: an image.
        spec: the model's preprocessing.
        fetch: downloads images that are URLs.

    Returns:
        uint8 [3, spec.size, spec.size], RGB, C-contiguous.

    Raises:
        ImageError: the image is unreadable, corrupt, of an unknown format, or too large.
    """
    return pixels_of(opened(image, fetch), spec)


def pixels_of(image: Opened, spec: ImageSpec) -> NDArray[np.uint8]:
    """Convert an image that was read to the input of the image tower, as `preprocess` does."""
    try:
        return to_pixels(_decoded(image.content, spec), spec)
    except ImageError as error:
        if image.name is None:
            raise
        raise error.within(image.name) from error


def encode_pixels(pixels: NDArray[np.uint8], spec: ImageSpec) -> bytes:
    """Encode an input of the image tower as a PNG that is preprocessed to exactly these pixels.

    The shorter edge of the PNG is `spec.resize` already, so that preprocessing only crops it.
    """
    _, size, _ = pixels.shape
    axis = _Axis.of(spec.resize, spec.resize, spec)
    whole = np.zeros((spec.resize, spec.resize, 3), np.uint8)
    crop = slice(axis.start, axis.start + size)
    whole[crop, crop] = pixels.transpose(1, 2, 0)
    buffer = BytesIO()
    Image.fromarray(whole).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def to_pixels(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """Resize the shorter edge or both to `spec.resize`, crop the center and convert to RGB.

    Up to an aspect ratio of about 80, the result differs from the reference pipeline named by
    `spec.pipeline` by at most one of 256 levels. Beyond that ratio, only the area that survives the
    crop is resized, so that an image of 1 x 60,000 pixels takes no longer than others. The result
    can then differ by two levels, and by more in nearly transparent areas of an image with alpha.

    Returns:
        uint8 [3, spec.size, spec.size], C-contiguous.

    Raises:
        ImageError: the image has no pixels, or Pillow cannot convert its mode to RGB.
        BundleError: `spec.size` is larger than `spec.resize`.
    """
    if not all(image.size):
        raise ImageError(f"the image has no pixels: its size is {image.size}")
    if spec.resize < spec.size:
        raise BundleError(
            f"image spec crops {spec.size} pixels out of {spec.resize}; expected resize >= size",
            advice="correct the checkpoint's preprocessor settings and export it again",
        )
    if spec.scale_16_bit and image.mode.startswith("I;16"):
        image = _scaled_to_8_bits(image)
    x, y = (_Axis.of(length, min(image.size), spec) for length in image.size)
    try:
        cropped = _cropped(image, x, y, spec)
    except (ValueError, OSError) as error:
        raise ImageError(
            f"an image of mode {image.mode!r} cannot be converted to RGB ({error})",
            advice="save it as an 8-bit RGB file",
        ) from error
    pixels = np.empty((3, spec.size, spec.size), np.uint8)
    for channel, band in zip(pixels, cropped.split(), strict=True):  # twice as fast as a transpose
        channel[:] = band
    return pixels


@dataclass(frozen=True, slots=True)
class _Axis:
    """Geometry of the resize and the center crop along one axis; both axes are independent."""

    length: int
    """Length of the image, in pixels."""
    resized: int
    """Length of the whole image after the resize, in pixels."""
    start: int
    """Offset of the crop in the resized image."""
    size: int
    """Length of the crop."""

    @classmethod
    def of(cls, length: int, shorter: int, spec: ImageSpec) -> "_Axis":
        """Compute the geometry as torchvision and transformers do: both truncate the longer edge.

        The offset is torchvision's `int(round((h - th) / 2.0))`, half to even, or transformers'
        `(orig_height - crop_height) // 2`.
        """
        squash = spec.resize_mode == "squash"
        resized = spec.resize if squash else int(spec.resize * length / shorter)
        spare = resized - spec.size
        start = round(spare / 2) if spec.pipeline == "openai" else spare // 2
        return cls(length, resized, start, spec.size)

    @property
    def box(self) -> tuple[float, float]:
        """Interval of the image that the crop covers."""
        stop = self.start + self.size
        return self.start * self.length / self.resized, stop * self.length / self.resized

    @property
    def reach(self) -> tuple[int, int]:
        """`box`, extended by all pixels that a filter reads around it."""
        low, high = self.box
        margin = _FILTER_RADIUS * max(1.0, self.length / self.resized) + 1
        return max(0, math.floor(low - margin)), min(self.length, math.ceil(high + margin))

    def nearest(self) -> NDArray[np.intp]:
        """Return the indices of the image's pixels that nearest neighbor selects, [size].

        Pillow accumulates positions (`ImagingScaleAffine` in Geometry.c). If a position falls on
        the border of two pixels, the accumulated rounding error decides, so it is reproduced here.
        Beyond `_EXACT_STEPS` it is not: there the reference would need gigabytes for its result.
        """
        step = self.length / self.resized
        if self.start <= _EXACT_STEPS:
            steps = np.full(self.start + self.size, step)
            steps[0] = step / 2
            positions = np.add.accumulate(steps)[self.start :]
        else:
            positions = (np.arange(self.start, self.start + self.size) + 0.5) * step
        return np.minimum(positions.astype(np.intp), self.length - 1)


def _cropped(image: Image.Image, x: _Axis, y: _Axis, spec: ImageSpec) -> Image.Image:
    """Return the reference pipeline's crop in RGB, without resizing the rest of the image."""
    resample = Image.Resampling[spec.interpolation.upper()]
    whole = _worth_resizing_whole(image, x, y)
    left = top = 0
    (x0, x1), (y0, y1) = x.reach, y.reach
    # Cropping first bounds the memory of conversions and keeps the coordinates of `box` small. It
    # would remove little of a common image, and the copy costs a millisecond of page faults.
    if not whole and 2 * (x1 - x0) * (y1 - y0) < x.length * y.length:
        image, left, top = image.crop((x0, y0, x1, y1)), x0, y0
    if spec.pipeline == "huggingface":
        image = _rgb_on_white(image)
    if resample == Image.Resampling.NEAREST or image.mode in ("1", "P"):
        rows, columns = y.nearest() - top, x.nearest() - left
        return Image.fromarray(np.asarray(_rgb(image))[rows[:, None], columns])
    if whole:
        resized = image.resize((x.resized, y.resized), resample)
        return _rgb(resized.crop((x.start, y.start, x.start + x.size, y.start + y.size)))
    box = (x.box[0] - left, y.box[0] - top, x.box[1] - left, y.box[1] - top)
    return _rgb(image.resize((x.size, y.size), resample, box))


def _worth_resizing_whole(image: Image.Image, x: _Axis, y: _Axis) -> bool:
    """Return whether resizing only the crop, which is faster, could differ from the reference.

    Pillow rounds `box` to float32, which changes one value in some thousands by one level between
    its two passes. If the image is scaled down by two or more, the second pass averages that away.
    If it is scaled down less, adjacent errors can add up to two levels. In an image with alpha, the
    result is divided by alpha, which can turn one level into dozens. Converting other color
    spaces to RGB can turn one level into four.
    """
    enlarged = any(axis.length < 2 * axis.resized for axis in (x, y))
    inexact = enlarged or image.mode in ("LA", "RGBA", "YCbCr", "HSV", "LAB")
    return inexact and x.resized * y.resized <= MAX_WHOLE_PIXELS


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB and drop transparency; the result may be `image` itself."""
    if image.mode == "RGB":
        return image
    if "transparency" in image.info:
        # Pillow would convert the transparent color too, and warn if it cannot.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _rgb_on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB as transformers 5.23 does (`image_transforms.convert_to_rgb`)."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return _rgb(image)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _decoded(content: bytes | Image.Image, spec: ImageSpec) -> Image.Image:
    if isinstance(content, bytes):
        return decode(content, exif_orientation=spec.exif_orientation)
    image = loaded(content)
    return ImageOps.exif_transpose(image) if spec.exif_orientation else image


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Map the values 0 to 65,535 of a 16-bit grayscale image to 0 to 255; 257 to 1."""
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
