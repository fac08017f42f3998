"""Encoded pictures -> uint8 pixels, as the model's own reference pipeline would make them.

Scaling, mean and standard deviation are not applied here: they live inside the image graph.

Two pipelines exist (`ImageSpec.pipeline`), and they differ in more than the order of steps:

- `openai`: torchvision's `Resize`, `CenterCrop`, then `image.convert("RGB")`, as in
  `clip/clip.py:_transform` and OpenCLIP. Transparency is dropped; palette and 1-bit pictures are
  resized by nearest neighbour, as Pillow does for those modes.
- `huggingface`: transformers' `CLIPImageProcessorPil`. Converts to RGB first, transparency
  composited onto white, then resizes and crops.

Neither applies EXIF orientation, and neither scales 16-bit pictures down: their values are clipped
at 255. Both are followed here.
"""

import math
import os
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.bundles.manifest import ImageSpec
from serving.errors import BundleError, ImageError
from serving.inputs.decode import decode, loaded, read_picture
from serving.limits import MAX_WHOLE_PIXELS

Picture: TypeAlias = bytes | str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""An encoded file's bytes, its path, a PIL image, or an RGB array uint8 [height, width, 3]."""

_FILTER_RADIUS = 3
"""Reach of the widest filter, Lanczos, in pixels of the coarser of source and result."""

_EXACT_STEPS = 1 << 20
"""Up to this start, nearest neighbour adds its positions up one by one, as Pillow does."""


def preprocess(picture: Picture, spec: ImageSpec) -> NDArray[np.uint8]:
    """Turns a picture, in any of the forms of `Picture`, into the pixels the image tower takes.

    Returns:
        uint8 [3, spec.size, spec.size], RGB, C-contiguous.

    Raises:
        ImageError: the picture is unreadable, corrupt, of an unknown format, or too large.
    """
    return to_pixels(_as_image(picture), spec)


def to_pixels(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """Resizes the shorter edge to `spec.resize`, crops the centre and converts to RGB.

    Equals the reference pipeline that `spec.pipeline` names within one of 256 levels up to an
    aspect ratio of about 80. Beyond, only what survives the crop is resized, so a 1 x 60000
    picture costs no more than another; two levels are then possible, and more where a picture
    with alpha is nearly transparent.

    Returns:
        uint8 [3, spec.size, spec.size], C-contiguous.

    Raises:
        ImageError: the picture has no pixels, or Pillow cannot convert its mode to RGB.
        BundleError: `spec` would crop more than it resizes to.
    """
    if not all(image.size):
        raise ImageError(f"the picture has no pixels: its size is {image.size}")
    if spec.resize < spec.size:
        raise BundleError(
            f"the image spec crops {spec.size} pixels out of {spec.resize}; expected resize >= "
            "size: correct the checkpoint's preprocessor settings and export it again"
        )
    x, y = (_Axis.of(length, min(image.size), spec) for length in image.size)
    try:
        centre = _centre(image, x, y, spec)
    except (ValueError, OSError) as error:
        raise ImageError(
            f"a picture of mode {image.mode!r} cannot be converted to RGB ({error}); "
            "save it as an 8-bit RGB file"
        ) from error
    pixels = np.empty((3, spec.size, spec.size), np.uint8)
    for channel, band in zip(pixels, centre.split(), strict=True):  # half the time of a transpose
        channel[:] = band
    return pixels


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of shortest-edge resize and centre crop; the two axes are independent."""

    length: int
    """Of the picture."""
    resized: int
    """Of the whole picture after the resize."""
    start: int
    """Where the crop begins, in the resized picture."""
    size: int
    """Of the crop."""

    @classmethod
    def of(cls, length: int, shorter: int, spec: ImageSpec) -> "_Axis":
        """Computes the geometry as torchvision and transformers do: both truncate the longer edge.

        The offset is torchvision's `int(round((h - th) / 2.0))`, half to even, or transformers'
        `(orig_height - crop_height) // 2`.
        """
        resized = int(spec.resize * length / shorter)
        spare = resized - spec.size
        start = round(spare / 2) if spec.pipeline == "openai" else spare // 2
        return cls(length, resized, start, spec.size)

    @property
    def box(self) -> tuple[float, float]:
        """What the crop covers in the picture."""
        stop = self.start + self.size
        return self.start * self.length / self.resized, stop * self.length / self.resized

    @property
    def reach(self) -> tuple[int, int]:
        """`box` and every pixel around it that a filter reaches."""
        low, high = self.box
        margin = _FILTER_RADIUS * max(1.0, self.length / self.resized) + 1
        return max(0, math.floor(low - margin)), min(self.length, math.ceil(high + margin))

    def nearest(self) -> NDArray[np.intp]:
        """Indices into the picture that nearest neighbour picks for the crop, [size].

        Pillow accumulates positions (`ImagingScaleAffine` in Geometry.c), and where one falls on
        the border of two pixels, the accumulated rounding error decides: it is reproduced. Beyond
        `_EXACT_STEPS` the reference would need gigabytes for its result.
        """
        step = self.length / self.resized
        if self.start <= _EXACT_STEPS:
            steps = np.full(self.start + self.size, step)
            steps[0] = step / 2
            positions = np.add.accumulate(steps)[self.start :]
        else:
            positions = (np.arange(self.start, self.start + self.size) + 0.5) * step
        return np.minimum(positions.astype(np.intp), self.length - 1)


def _centre(image: Image.Image, x: _Axis, y: _Axis, spec: ImageSpec) -> Image.Image:
    """Returns the crop the reference pipeline would return, RGB, without resizing the rest."""
    resample = Image.Resampling[spec.interpolation.upper()]
    whole = _worth_resizing_whole(image, x, y)
    left = top = 0
    (x0, x1), (y0, y1) = x.reach, y.reach
    # Cropping first bounds what a conversion copies, and keeps the coordinates of `box` small. Of
    # a common picture it would remove little, and the copy costs a millisecond of page faults.
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
    """Tells whether a resize of the crop alone, cheaper, could stray from the reference.

    Pillow rounds `box` to float32, which moves one value in some thousands by one level between
    its two passes. Scaled down by two or more, the second pass averages that away. Scaled less,
    neighbours can add up to two levels; and of a picture with alpha, the result is divided by
    alpha, which makes a level into dozens.
    """
    strays = image.mode in ("LA", "RGBA") or x.length < 2 * x.resized
    return strays and x.resized * y.resized <= MAX_WHOLE_PIXELS


def _rgb(image: Image.Image) -> Image.Image:
    """Converts to RGB and drops transparency; the result may be `image` itself."""
    if image.mode == "RGB":
        return image
    if "transparency" in image.info:
        # Pillow would carry the transparent colour along, and warn where it cannot.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _rgb_on_white(image: Image.Image) -> Image.Image:
    """Converts to RGB as transformers 5.23 does (`image_transforms.convert_to_rgb`)."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return _rgb(image)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _as_image(picture: Picture) -> Image.Image:
    match picture:
        case bytes():
            return decode(picture)
        case str() | os.PathLike():
            data = read_picture(picture)
            try:
                return decode(data)
            except ImageError as error:
                raise error.within(os.fspath(picture)) from error
        case Image.Image():
            return loaded(picture)
        case np.ndarray():
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ImageError(
                    "expected an RGB array uint8 [height, width, 3], got "
                    f"{picture.dtype} {list(picture.shape)}"
                )
            return loaded(Image.fromarray(picture))
        case other:
            raise ImageError(
                "expected encoded bytes, a path, a PIL image or an RGB array, got "
                f"{type(other).__name__}"
            )
