"""Pixels compared with the two reference pipelines, and invalid images."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from serving import limits
from serving.bundles.manifest import ImageSpec
from serving.errors import BundleError, ImageError
from serving.inputs.decode import decode, read_image
from serving.inputs.preprocess import preprocess, to_pixels

MODES = ("RGB", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "1", "I;16")
SIZES = (
    (640, 480),
    (480, 641),
    (333, 500),
    (301, 224),
    (224, 224),
    (225, 224),
    (57, 43),
    (7, 5),
    (1, 1),
    (3, 1),
    (1, 50),
    (900, 12),
    (1024, 512),
    (1500, 450),
)


def spec(pipeline="openai", size=224, resize=None, interpolation="bicubic"):
    return ImageSpec(
        size=size,
        resize=size if resize is None else resize,
        interpolation=interpolation,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        pipeline=pipeline,
    )


def picture(mode="RGB", size=(640, 480), seed=0):
    """Noise over a gradient: hard edges for the filter, and nearly all values."""
    rng = np.random.default_rng(seed)
    width, height = size
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 700, (height, width), dtype=np.uint16))
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    noise[..., 1] = np.linspace(0, 255, width, dtype=np.uint8)
    if channels == 1:
        image = Image.fromarray(noise[..., 0])
        if mode == "P":
            image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        return image.convert(mode)
    bands = [Image.fromarray(noise[..., c]) for c in range(channels)]
    return Image.merge(mode, bands)


def openai_reference(image, size=224, resize=None, interpolation="bicubic"):
    """torchvision's Resize and CenterCrop on a PIL image and OpenAI's conversion, written out."""
    resize = size if resize is None else resize
    width, height = image.size
    short, long = sorted((width, height))
    new_short, new_long = resize, int(resize * long / short)
    new = (new_short, new_long) if width <= height else (new_long, new_short)
    resized = image.resize(new, Image.Resampling[interpolation.upper()])
    top = int(round((new[1] - size) / 2.0))  # noqa: RUF046  (same as torchvision)
    left = int(round((new[0] - size) / 2.0))  # noqa: RUF046
    cropped = resized.crop((left, top, left + size, top + size))
    return np.asarray(cropped.convert("RGB")).transpose(2, 0, 1)


def huggingface_reference(image, size=224, resize=None, interpolation="bicubic"):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size if resize is None else resize},
        crop_size={"height": size, "width": size},
        resample=Image.Resampling[interpolation.upper()],
        do_rescale=False,
        do_normalize=False,
    )
    return processor(image, return_tensors="np")["pixel_values"][0]


REFERENCES = {"openai": openai_reference, "huggingface": huggingface_reference}


def distance(image, pipeline, **settings):
    ours = to_pixels(image.copy(), spec(pipeline, **settings))
    theirs = REFERENCES[pipeline](image, **settings)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    assert ours.shape == theirs.shape
    return np.abs(ours.astype(int) - theirs.astype(int))


@pytest.mark.parametrize("pipeline", REFERENCES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_size_equals_the_reference(mode, pipeline):
    for size in SIZES:
        difference = distance(picture(mode, size), pipeline)
        assert difference.max() <= 1, size
        assert difference.mean() < 0.01, size


@pytest.mark.parametrize("pipeline", REFERENCES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (223, 256), (64, 65), (32, 32)])
def test_every_interpolation_and_crop_equals_the_reference(pipeline, interpolation, size, resize):
    for shape in ((301, 224), (500, 333), (96, 64), (5, 9)):
        difference = distance(
            picture("RGB", shape),
            pipeline,
            size=size,
            resize=resize,
            interpolation=interpolation,
        )
        assert difference.max() <= (0 if interpolation == "nearest" else 1), shape


@pytest.mark.parametrize("mode", ["P", "1", "RGB"])
def test_nearest_neighbour_breaks_ties_as_pillow_does(mode):
    rng = np.random.default_rng(1)
    for width, height in rng.integers(1, 400, (150, 2)).tolist():
        image = picture(mode, (width, height), seed=width)
        kwargs = {"size": 48, "resize": 52, "interpolation": "nearest"}
        assert distance(image, "openai", **kwargs).max() == 0, (width, height)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_squash_equals_the_references(mode, interpolation):
    """open_clip resizes a PIL image to a square, transformers does so for a size of two edges."""
    squash = replace(spec(interpolation=interpolation), resize_mode="squash")
    processor = CLIPImageProcessorPil(
        size={"height": 224, "width": 224},
        resample=Image.Resampling[interpolation.upper()],
        do_center_crop=False,
        do_rescale=False,
        do_normalize=False,
    )
    for size in SIZES:
        image = picture(mode, size)
        resized = image.resize((224, 224), Image.Resampling[interpolation.upper()])
        theirs = {
            "openai": np.asarray(resized.convert("RGB")).transpose(2, 0, 1),
            "huggingface": processor(image, return_tensors="np")["pixel_values"][0],
        }
        for pipeline, expected in theirs.items():
            ours = to_pixels(image.copy(), replace(squash, pipeline=pipeline))
            assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1, (size, pipeline)


def test_crop_offset_depends_on_the_pipeline():
    # With 7 spare rows, torchvision rounds 3.5 to 4, and transformers floors it to 3.
    rows = np.repeat(np.arange(231, dtype=np.uint8)[:, None], 224, axis=1)
    image = Image.fromarray(rows)
    assert to_pixels(image, spec("openai"))[0, 0, 0] == 4
    assert to_pixels(image, spec("huggingface"))[0, 0, 0] == 3
    # With 5 spare rows, torchvision rounds 2.5 to the even 2, and transformers floors it to 2.
    image = image.crop((0, 0, 224, 229))
    assert to_pixels(image, spec("openai"))[0, 0, 0] == 2
    assert to_pixels(image, spec("huggingface"))[0, 0, 0] == 2


def test_transparency_is_dropped_or_white_by_pipeline():
    image = Image.new("RGBA", (300, 200), (200, 10, 30, 0))
    assert to_pixels(image, spec("huggingface")).min() == 255
    dropped = to_pixels(Image.new("RGBA", (300, 200), (200, 10, 30, 255)), spec("openai"))
    assert dropped[:, 0, 0].tolist() == [200, 10, 30]


@pytest.mark.parametrize("pipeline", REFERENCES)
@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_a_palette_with_transparency_equals_the_reference_without_warning(transparency, pipeline):
    buffer = io.BytesIO()
    picture("P", (300, 200)).save(buffer, "PNG", transparency=transparency)
    ours = preprocess(buffer.getvalue(), spec(pipeline))
    image = Image.open(buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = REFERENCES[pipeline](image)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_preprocessing_does_not_change_the_image():
    image = picture("P", (50, 40))
    image.info["transparency"] = 3
    before = image.tobytes()
    to_pixels(image, spec())
    assert image.info["transparency"] == 3
    assert image.mode == "P"
    assert image.tobytes() == before


EXTREMES = """
import resource
from PIL import Image
from serving import limits
from serving.inputs import preprocess
from serving.bundles.manifest import ImageSpec
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, resource.RLIM_INFINITY))
for pipeline in ("openai", "huggingface"):
    spec = ImageSpec(size=224, resize=224, interpolation="bicubic", pipeline=pipeline,
                     mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    for mode in {modes}:
        for size in ((1, 60000), (60000, 1), (1, limits.MAX_PIXELS // 8)):
            assert preprocess.to_pixels(Image.new(mode, size), spec).shape == (3, 224, 224)
"""


def test_extreme_aspect_ratio_stays_within_memory():
    # Resizing all of 1 x 60000 needs 3 to 12 GB. The process may use 2 GB, including libraries.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EXTREMES.format(modes=MODES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pipeline", REFERENCES)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "I;16"])
def test_an_extreme_aspect_ratio_stays_close_to_the_reference(mode, pipeline):
    for size in ((1, 120), (2000, 9)):
        difference = distance(picture(mode, size), pipeline)
        assert difference.max() <= 2, size
        assert difference.mean() < 0.01, size


def test_extreme_aspect_ratio_crops_the_middle():
    column = np.zeros((60001, 1, 3), np.uint8)
    column[30000] = 255
    pixels = preprocess(column, spec(interpolation="nearest"))
    assert pixels.min() == 255
    column[29999:30002] = (10, 20, 30)
    pixels = preprocess(column, spec())
    assert pixels[:, 112, 0].tolist() == [10, 20, 30]


def test_middle_of_the_longest_image_equals_a_short_crop():
    # Pillow stores a box in float32, which has steps of half a pixel at four million.
    rows = np.zeros((2**23 + 1, 1), np.uint8)
    middle = slice(2**22 - 30, 2**22 + 31)
    rows[middle, 0] = np.random.default_rng(3).integers(0, 256, 61)
    pixels = to_pixels(Image.fromarray(rows), spec(resize=256)).astype(int)
    assert np.abs(pixels - openai_reference(Image.fromarray(rows[middle]), resize=256)).max() <= 2


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", limits.FORMATS)
def test_every_format_decodes(kind):
    image = picture("P" if kind == "GIF" else "RGB", (60, 40))
    data = encoded(image, kind)
    assert decode(data).size == (60, 40)
    theirs = openai_reference(Image.open(io.BytesIO(data)))
    assert np.abs(preprocess(data, spec()).astype(int) - theirs).max() <= 1


def test_all_forms_of_an_image_give_the_same_pixels(tmp_path):
    image = picture("RGB", (100, 80))
    path = tmp_path / "a picture.png"
    image.save(path)
    expected = preprocess(image, spec())
    forms = (path.read_bytes(), str(path), path, np.asarray(image), Image.open(path))
    for form in forms:
        assert np.array_equal(preprocess(form, spec()), expected)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert preprocess(data, spec())[:, 100, 100].tolist() == [255, 0, 0], kind


def test_exif_orientation_is_not_applied():
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    assert decode(encoded(image, "JPEG", exif=exif)).size == (40, 20)


def test_sixteen_bit_gray_is_clipped_like_the_references():
    image = Image.fromarray(np.full((30, 30), 40000, np.uint16))
    assert preprocess(encoded(image, "PNG"), spec()).min() == 255


def png_header(width, height):
    """A PNG that declares a size and has no pixel data."""
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


# Within Pillow's own limit, where Pillow warns, where Pillow raises, and far beyond.
@pytest.mark.parametrize("size", [(8193, 8192), (10000, 10000), (20000, 20000), (2**30, 2**30)])
def test_large_declared_size_is_rejected_before_decoding(size):
    with pytest.raises(ImageError, match=r"pixels.*allowed|too large"):
        decode(png_header(*size))


def test_pillow_warnings_are_suppressed_without_changing_filters():
    data = png_header(10000, 10000)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    before = list(warnings.filters)

    def refused(_):
        with pytest.raises(ImageError, match="10000 x 10000 pixels"):
            decode(data)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(refused, range(64)))
    assert warnings.filters == before


def test_largest_allowed_size_passes_the_check():
    with pytest.raises(ImageError, match="truncated or corrupt"):
        decode(png_header(8192, 8192))


JPEG = encoded(picture("RGB", (64, 48)), "JPEG")
PNG = encoded(picture("RGB", (64, 48)), "PNG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got 0 bytes"),
        (b"\n<!DOCTYPE html><html>404</html>", r"web page \(HTML\)"),
        (b"\xef\xbb\xbf<html lang=en>", r"web page \(HTML\)"),
        (b"just a text file renamed", r"one of JPEG, PNG, .* got 24 bytes that start with b'just"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "start with b.<svg"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "start with"),
        (JPEG[:2], "only the beginning"),
        (JPEG[: len(JPEG) // 2], "truncated or corrupt"),
        (PNG[: len(PNG) // 2], "truncated or corrupt"),
        (PNG[:60] + bytes(40) + PNG[100:], "truncated or corrupt"),
        (png_header(0, 5), "start with|no pixels|corrupt|damaged"),
    ],
)
def test_data_that_is_not_an_image_is_rejected(data, message):
    with pytest.raises(ImageError, match=message):
        preprocess(data, spec())


def test_damaged_data_raises_image_error_or_decodes():
    rng = np.random.default_rng(2)
    palette = picture("P", (64, 48))
    intact = [encoded(palette.convert("RGB"), k) for k in limits.FORMATS if k != "GIF"]
    for data in [*intact, encoded(palette, "GIF")]:
        for _ in range(60):
            broken = bytearray(data[: rng.integers(len(data) // 4, len(data))])
            for at in rng.integers(0, min(len(broken), 300), 3):
                broken[at] = rng.integers(256)
            with contextlib.suppress(ImageError):
                assert preprocess(bytes(broken), spec(size=8)).shape == (3, 8, 8)


def test_unreadable_file_is_named(tmp_path):
    empty = tmp_path / "empty.jpg"
    empty.touch()
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    with pytest.raises(ImageError, match=r"missing\.jpg: no such file; give the path"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="is a directory"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match=r"empty\.jpg: is empty \(0 bytes\); copy") as caught:
        read_image(empty)
    assert caught.value.name == str(empty)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image("a\0b.jpg")
    with pytest.raises(ImageError, match=r"notes\.jpg: expected one of JPEG"):
        preprocess(text, spec())


def test_other_objects_are_rejected(tmp_path):
    with pytest.raises(ImageError, match="got list"):
        preprocess([1, 2, 3], spec())
    with pytest.raises(ImageError, match="no pixels"):
        preprocess(np.zeros((0, 5, 3), np.uint8), spec())
    with pytest.raises(ImageError, match="mode 'La' cannot be converted to RGB"):
        preprocess(Image.new("La", (9, 9)), spec())
    with pytest.raises(ImageError, match="8193 x 8192 pixels"):
        preprocess(Image.new("1", (8193, 8192)), spec())
    path = tmp_path / "half.jpg"
    path.write_bytes(JPEG[: len(JPEG) // 2])
    with Image.open(path) as half, pytest.raises(ImageError, match="truncated or corrupt"):
        preprocess(half, spec())


def test_crop_larger_than_the_resize_is_rejected():
    with pytest.raises(BundleError, match="crops 256 pixels out of 224"):
        to_pixels(picture(), spec(size=256, resize=224))
