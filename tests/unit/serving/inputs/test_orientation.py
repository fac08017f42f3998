"""EXIF orientation compared with Pillow's `exif_transpose`, 16-bit images with NumPy's division."""

import io
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from serving.bundles.manifest import ImageSpec
from serving.inputs.decode import decode
from serving.inputs.image_metadata import orientation
from serving.inputs.preprocess import preprocess
from serving.limits import MAX_PARTS

PLAIN = ImageSpec(
    size=24,
    resize=24,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    pipeline="openai",
)
ORIENTED = replace(PLAIN, exif_orientation=True)
SCALED = replace(PLAIN, scale_16_bit=True)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def encoded(form, value, image=IMAGE, order="<"):
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "a maker"  # another entry comes first
    exif[0x0112] = value
    buffer = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    image.save(buffer, form, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", [*range(10), 77])
def test_orientation_equals_pillows(form, value):
    for order in "<>":
        data = encoded(form, value, order=order)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert orientation(data) == (value if 1 <= value <= 8 else 1)
        ours = decode(data, exif_orientation=True)
        assert ours.size == expected.size
        assert np.array_equal(np.asarray(ours), np.asarray(expected))
        assert decode(data).size == (60, 40)
        pixels = preprocess(data, ORIENTED)
        assert np.array_equal(pixels, preprocess(expected.copy(), PLAIN))
        assert np.array_equal(preprocess(Image.open(io.BytesIO(data)), ORIENTED), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA", "I;16"])
def test_every_mode_is_rotated(mode):
    image = IMAGE.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    data = encoded("PNG", 6, image)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(preprocess(data, ORIENTED), preprocess(expected.copy(), PLAIN))


def test_images_without_orientation_are_unchanged():
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        buffer = io.BytesIO()
        IMAGE.save(buffer, form)
        data = buffer.getvalue()
        assert orientation(data) == 1
        assert np.array_equal(preprocess(data, ORIENTED), preprocess(data, PLAIN))


def test_damaged_metadata_has_no_orientation_and_ends_soon():
    rng = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(form, 6)
        for end in range(0, 200, 7):
            assert orientation(data[:end]) in (1, 6)
        for _ in range(300):
            broken = bytearray(data)
            for at in rng.integers(0, min(len(data), 250), 4):
                broken[at] = rng.integers(256)
            assert 1 <= orientation(bytes(broken)) <= 8
    many = b"\x89PNG\r\n\x1a\n" + (bytes(4) + b"tEXt" + bytes(4)) * (2 * MAX_PARTS)
    assert orientation(many) == 1
    entries = b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(12 * 65535)
    assert (
        orientation(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(entries)) + b"eXIf" + entries) == 1
    )


@pytest.mark.parametrize("pipeline", ["openai", "huggingface"])
@pytest.mark.parametrize("form", ["PNG", "I;16", "I;16B"])
def test_16_bit_gray_is_scaled(form, pipeline):
    values = np.random.default_rng(0).integers(0, 65536, (40, 60), np.uint16)
    values[0, :4] = (0, 128, 129, 65535)
    expected = np.rint(values / 65535 * 255).astype(np.uint8)
    if form == "PNG":
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        image = buffer.getvalue()
    else:
        image = Image.frombytes(form, (60, 40), values.astype(">u2" if "B" in form else "<u2"))
    plain, scaled = (replace(spec, pipeline=pipeline) for spec in (PLAIN, SCALED))
    assert np.array_equal(preprocess(image, scaled), preprocess(Image.fromarray(expected), plain))
    clipped = np.minimum(values, 255).astype(np.uint8)
    if pipeline == "huggingface":  # the reference clips first; openai resizes first
        assert np.array_equal(preprocess(image, plain), preprocess(Image.fromarray(clipped), plain))


def test_all_65536_values_are_rounded():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    spec = replace(SCALED, size=256, resize=256)
    expected = np.rint(values / 65535 * 255).astype(np.uint8)
    assert np.array_equal(preprocess(Image.fromarray(values), spec)[0], expected)


def test_other_modes_are_not_scaled():
    for mode in ("L", "RGB", "I", "F"):
        image = IMAGE.convert(mode)
        assert np.array_equal(preprocess(image, SCALED), preprocess(image, PLAIN))


def test_commands_take_the_options(tiny_bundle, tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", 6))
    rows = []
    for options in ([], ["--exif-orientation", "--scale-16-bit"]):
        output = tmp_path / f"{len(options)}.npz"
        command = [sys.executable, "-m", "serving", "embed", str(tmp_path / "a.jpg"), "--output"]
        command += [str(output), "--bundle", str(tiny_bundle.path), "--runner", "onnxruntime:fp32"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(output) as saved:
            rows.append(saved["embeddings"])
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
