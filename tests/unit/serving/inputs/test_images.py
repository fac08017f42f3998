"""Images in all forms that people have become the same pixels, or a clear error."""

import array
import base64
import io
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from serving.bundles.manifest import ImageSpec
from serving.errors import ImageError
from serving.inputs import images as module
from serving.inputs.images import each_image
from serving.inputs.preprocess import encode_pixels, preprocess
from serving.limits import MAX_IMAGE_BYTES

SPEC = ImageSpec(
    size=24,
    resize=24,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    pipeline="openai",
)
ARRAY = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
IMAGE = Image.fromarray(ARRAY)
EXPECTED = preprocess(IMAGE, SPEC)
MODES = (
    *("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX"),
    *("RGBa", "I;16", "I;16L", "I;16B"),
)


def png(image=IMAGE):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
TEXT = base64.b64encode(PNG).decode()
RAW = io.BytesIO()
IMAGE.save(RAW, "PNG")  # at its end, as people leave it


class Reader:
    """File that cannot seek and has nothing but `read`."""

    def __init__(self, data):
        self._file = io.BytesIO(data)

    def read(self, size):
        return self._file.read(size)


FORMS = {
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "memoryview": memoryview(PNG),
    "array of bytes": memoryview(array.array("B", PNG)),
    "BytesIO": RAW,
    "pipe": Reader(PNG),
    "PIL image": IMAGE,
    "array": ARRAY,
    "strided array": np.repeat(ARRAY, 2, axis=1)[:, ::2],
    "torch": torch.from_numpy(ARRAY),
    "base64": TEXT,
    "base64 in lines": base64.encodebytes(PNG).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    "data URI": f"data:image/png;base64,{TEXT}",
    "data URI with a type parameter": f"DATA:image/png;charset=x;BASE64,{TEXT}",
    "percent-encoded data URI": "data:image/png;base64," + TEXT.replace("+", "%2B"),
    "numpy str": np.str_(f"data:image/png;base64,{TEXT}"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels_alone_and_in_a_list(form):
    image = FORMS[form]
    for images in (image, [image]):
        if form == "pipe":
            images = Reader(PNG) if images is image else [Reader(PNG)]
        (only,) = each_image(images)
        assert np.array_equal(preprocess(only, SPEC), EXPECTED)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "an image.png"
    path.write_bytes(PNG)
    return path


def test_paths_and_open_files(file):
    with file.open("rb") as opened:
        opened.read(7)
        for form in (file, str(file), np.str_(file), opened):
            (only,) = each_image(form)
            assert np.array_equal(preprocess(only, SPEC), EXPECTED)


COLLECTIONS = {
    "tuple": tuple,
    "generator": iter,
    "array of str": np.array,
    "array of objects": lambda paths: np.array(paths, dtype=object),
    "pandas column": pandas.Series,
    "pandas index": pandas.Index,
    "dict values": lambda paths: dict(enumerate(paths)).values(),
    "map": lambda paths: map(Path, paths),
}


@pytest.mark.parametrize("kind", COLLECTIONS)
def test_any_ordered_iterable_is_accepted(kind, file):
    found = list(each_image(COLLECTIONS[kind]([str(file)] * 3)))
    assert [str(path) for path in found] == [str(file)] * 3


def test_batch_arrays_are_split_into_images():
    for batch in (np.stack([ARRAY] * 3), torch.from_numpy(np.stack([ARRAY] * 3))):
        found = list(each_image(batch))
        assert len(found) == 3
        assert np.array_equal(preprocess(found[2], SPEC), EXPECTED)
    assert list(each_image(np.zeros((0, 5, 5, 3), np.uint8))) == []


def test_gray_and_transparent_arrays_equal_pil_images():
    rng = np.random.default_rng(1)
    for shape, mode in (((30, 40), "L"), ((30, 40, 1), "L"), ((30, 40, 4), "RGBA")):
        values = rng.integers(0, 256, shape, np.uint8)
        for pipeline in ("openai", "huggingface"):
            spec = replace(SPEC, pipeline=pipeline)
            image = Image.frombytes(mode, (40, 30), values.tobytes())
            assert np.array_equal(preprocess(values, spec), preprocess(image, spec))


@pytest.mark.parametrize(
    ("image", "reason", "advice"),
    [
        (np.zeros((4, 5, 3)), "float64 [4, 5, 3]", "multiply"),
        (torch.zeros(3, 40, 50), "float32 [3, 40, 50]", "multiply"),
        (np.zeros((3, 40, 50), np.uint8), "uint8 [3, 40, 50]", "moveaxis"),
        (np.zeros((6, 5, 2), np.uint8), "uint8 [6, 5, 2]", "channels last"),
        (np.zeros((4, 5), np.uint16), "uint16 [4, 5]", "0 to 255"),
        (np.zeros(5, np.uint8), "uint8 [5]", "channels last"),
        (torch.zeros(2, requires_grad=True), "cannot be converted to a numpy array", "detach"),
        (io.StringIO("text"), "got str", "binary mode"),
        ({"bytes": PNG}, "got dict", ""),
        ([PNG], "got list", ""),
        (None, "got nonetype", ""),
        (7, "got int", ""),
        ("", "path is empty", "path of an image"),
        ("data:image/png;base64", "no comma", "data:image/png"),
        (f"data:image/png;base64,{TEXT}$", "base64 text is damaged", "encode it again"),
        ("data:,hello", "start with b'hello'", ""),
        ("https://example.com/a.jpg", "the url 'https://example.com/a.jpg'", "fetch="),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_unusable_image_says_what_arrived_and_what_to_do(image, reason, advice):
    with pytest.raises(ImageError) as caught:
        preprocess(image, SPEC)
    assert reason in caught.value.reason.lower()
    assert advice in caught.value.advice
    (held,) = each_image([image])  # inside a list it is the same error, raised when its turn comes
    with pytest.raises(ImageError) as again:
        preprocess(held, SPEC)
    assert (again.value.reason, again.value.advice) == (caught.value.reason, caught.value.advice)


@pytest.mark.parametrize(
    "images", [{"a": PNG}, {PNG}, None, 7, np.array([b"a"]), pandas.DataFrame({"a": ["x"]})]
)
def test_what_is_not_an_ordered_collection_is_rejected(images):
    with pytest.raises(ImageError) as caught:
        list(each_image(images))
    assert caught.value.reason


def test_closed_file_is_rejected():
    file = io.BytesIO(PNG)
    file.close()
    with pytest.raises(ImageError) as caught:
        preprocess(file, SPEC)
    assert "closed" in caught.value.reason


LONG = (
    "x" * 1_700_000,
    "data:image/png;base64," + "A" * 1_700_000,
    "data:" + "A" * 1_700_000,
    TEXT + "$" * 1_700_000,
    "https://example.com/" + "a" * 1_700_000,
    "y" * 4000,
    Path("z" * 4000),
    b"x" * 1_700_000,
)


@pytest.mark.parametrize("image", LONG, ids=range(len(LONG)))
def test_no_error_echoes_a_long_input(image):
    with pytest.raises(ImageError) as caught:
        preprocess(image, SPEC)
    assert len(str(caught.value)) < 1000
    assert len(caught.value.name or "") < 1000


def test_encoded_size_is_limited_in_every_form():
    large = bytes(MAX_IMAGE_BYTES + 1)
    for form in (
        large,
        bytearray(large),
        memoryview(large),
        io.BytesIO(large),
        Reader(large),
        "data:;base64," + base64.b64encode(large).decode(),
        "data:," + "a" * (MAX_IMAGE_BYTES + 1),
        "data:," + "a" * (5 * MAX_IMAGE_BYTES),
    ):
        with pytest.raises(ImageError) as caught:
            preprocess(form, SPEC)
        assert str(MAX_IMAGE_BYTES) in caught.value.reason


# ------------------------------------------------------------------ iterators


def test_images_of_an_iterator_stay_valid(file):
    """A generator may close its files, and write the next image into the same memory."""

    def files():
        for _ in range(2):
            with file.open("rb") as opened:
                yield opened
        with Image.open(file) as image:
            yield image

    def frames():
        frame = np.empty_like(ARRAY)
        for value in range(3):
            frame[:] = value
            yield frame

    for image in list(each_image(files())):
        assert np.array_equal(preprocess(image, SPEC), EXPECTED)
    means = [preprocess(image, SPEC).mean() for image in list(each_image(frames()))]
    assert means == [0, 1, 2]


def test_iterators_are_read_one_by_one():
    taken = []

    def source():
        for index in range(5):
            taken.append(index)
            yield PNG

    found = each_image(source())
    assert taken == []
    next(found)
    assert taken == [0]


# ------------------------------------------------------------------ URLs


def test_urls_are_downloaded_by_the_given_function():
    asked = []

    def fetch(url):
        asked.append(url)
        return bytearray(PNG)

    url = "HTTPS://example.com/a.png?b"
    assert np.array_equal(preprocess(url, SPEC, fetch), EXPECTED)
    assert asked == [url]


def test_failure_of_the_download_is_an_image_error():
    def failing(url):
        raise KeyError("no such host " + "x" * 10_000)

    with pytest.raises(ImageError) as caught:
        preprocess("http://example.com/a", SPEC, failing)
    assert "KeyError" in caught.value.reason
    assert caught.value.name == "http://example.com/a"
    assert len(str(caught.value)) < 500
    for wrong, got in ((lambda url: None, "NoneType"), (lambda url: "text", "str")):
        with pytest.raises(ImageError) as caught:
            preprocess("http://example.com/a", SPEC, wrong)
        assert got in caught.value.reason
    with pytest.raises(ImageError) as caught:
        preprocess("http://example.com/a", SPEC, lambda url: b"<html>")
    assert caught.value.name == "http://example.com/a"


# ------------------------------------------------------------------ pixels sent to the server


def in_mode(mode):
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(IMAGE, *profiles, outputMode="LAB")
    if mode.startswith("I;16"):
        values = np.random.default_rng(0).integers(0, 700, (40, 60), np.uint16)
        return Image.frombytes(mode, (60, 40), values.astype(">u2" if "B" in mode else "<u2"))
    return IMAGE.convert({"PA": "P", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)


@pytest.mark.parametrize("pipeline", ["openai", "huggingface"])
@pytest.mark.parametrize("mode", MODES)
def test_sent_pixels_are_preprocessed_to_themselves(mode, pipeline):
    for size, resize, interpolation in (
        (24, 24, "bicubic"),
        (24, 31, "bicubic"),
        (23, 30, "nearest"),
        (24, 27, "lanczos"),
        (224, 256, "bilinear"),
    ):
        spec = replace(
            SPEC, size=size, resize=resize, interpolation=interpolation, pipeline=pipeline
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels = preprocess(in_mode(mode), spec)
        sent = encode_pixels(pixels, spec)
        for changed in (spec, replace(spec, exif_orientation=True, scale_16_bit=True)):
            assert np.array_equal(preprocess(sent, changed), pixels)


def test_module_reads_no_more_than_it_must():
    """A file larger than the limit is read up to one byte more."""

    class Endless:
        def read(self, size):
            self.asked = size
            return bytes(size)

    endless = Endless()
    with pytest.raises(ImageError):
        module.opened(endless)
    assert endless.asked == MAX_IMAGE_BYTES + 1
