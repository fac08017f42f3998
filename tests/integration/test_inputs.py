"""Both clients take the same inputs, compute the same embeddings and raise the same errors."""

import base64
import io
import threading
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image, ImageCms

from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import ClipDeployError, ImageError, TextError
from serving.tasks.rank import Category, answer, caption, rank
from serving.tasks.zero_shot import ZeroShotClassifier
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.servers import encoded

PROTOCOLS = ("grpc", "http")
LABELS = ["a cat", "a dog"]
MODES = (
    *("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX"),
    *("RGBa", "La", "I;16", "I;16L", "I;16B"),
)
ARRAY = np.asarray(Image.open(io.BytesIO(encoded(1, "PNG"))))


def fetch(url):
    return encoded(int(url.rpartition("/")[2]), "PNG")


@pytest.fixture(scope="module", params=[False, True], ids=["default", "opted in"])
def server(tiny_bundle, tmp_path_factory, request):
    """A server with default preprocessing, and one with all opt-ins."""
    repository = tmp_path_factory.mktemp("served") / "repository"
    assemble(
        tiny_bundle,
        repository,
        runner="onnxruntime:fp32",
        max_batch_size=16,
        exif_orientation=request.param,
        scale_16_bit=request.param,
    )
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as running:
        running.opted_in = request.param
        yield running


@pytest.fixture(scope="module", params=PROTOCOLS)
def client(server, request):
    with ClipClient(getattr(server, f"{request.param}_url"), fetch=fetch) as opened:
        yield opened


@pytest.fixture(scope="module")
def local(tiny_bundle, server):
    opted = server.opted_in
    with LocalClip(
        tiny_bundle.path, fetch=fetch, exif_orientation=opted, scale_16_bit=opted
    ) as opened:
        yield opened


def raised(action, *arguments):
    """Return the type and the fields of the error of `action(*arguments)`."""
    with pytest.raises(ClipDeployError) as caught:
        action(*arguments)
    return type(caught.value), vars(caught.value)


def in_mode(mode):
    image = Image.fromarray(ARRAY)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    if mode.startswith("I;16"):
        values = np.random.default_rng(0).integers(0, 65536, (48, 64), np.uint16)
        return Image.frombytes(mode, (64, 48), values.astype(">u2" if "B" in mode else "<u2"))
    return image.convert({"PA": "P", "RGBa": "RGBA", "La": "LA"}.get(mode, mode)).convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_same_embedding_or_error(mode, client, local):
    image = in_mode(mode)
    if mode == "La":
        assert raised(client.embed_images, image) == raised(local.embed_images, image)
        return
    np.testing.assert_allclose(client.embed_images(image), local.embed_images(image), atol=1e-5)


def test_every_form_has_the_same_embedding(client, local, tmp_path):
    data = encoded(1, "PNG")
    path = tmp_path / "an image.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    forms = [path, str(path), data, bytearray(data), memoryview(data), Image.open(path), ARRAY]
    forms += [
        text,
        f"data:image/png;base64,{text}",
        torch.from_numpy(ARRAY.copy()),
        "http://host/1",
    ]
    expected = local.embed_images([data])
    for one in (client, local):
        with path.open("rb") as file:
            every = [*forms, io.BytesIO(data), file]
            found = one.embed_images(every)
        np.testing.assert_allclose(found, np.repeat(expected, len(every), axis=0), atol=1e-5)
        for form in forms:
            alone = one.embed_images(form)
            assert alone.shape == (1, 32)
            np.testing.assert_allclose(alone, expected, atol=1e-5)
        for many in (
            iter([data, data]),
            pandas.Series([str(path)] * 2),
            np.array([str(path)] * 2),
            np.stack([ARRAY] * 2),
            (image for image in [data, data]),
        ):
            np.testing.assert_allclose(one.embed_images(many), expected.repeat(2, 0), atol=1e-5)


def test_orientation_and_depth_follow_the_repository(client, local, server):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(ARRAY).save(buffer, "PNG", exif=exif)
    turned = Image.fromarray(np.rot90(ARRAY, -1) if server.opted_in else ARRAY)
    deep = np.random.default_rng(0).integers(0, 65536, (48, 64), np.uint16)
    scaled = np.rint(deep / 257) if server.opted_in else np.minimum(deep, 255)
    buffer16 = io.BytesIO()
    Image.fromarray(deep).save(buffer16, "PNG")
    expected = local.embed_images([turned, scaled.astype(np.uint8)])
    for one in (client, local):
        for form in (
            [buffer, buffer16],
            [Image.open(io.BytesIO(b.getvalue())) for b in (buffer, buffer16)],
        ):
            np.testing.assert_allclose(one.embed_images(form), expected, atol=1e-5)
    assert f'"exif_orientation": {str(server.opted_in).lower()}' in client.facts["image"]


EMPTY = {"list": [], "tuple": (), "array": np.zeros((0, 5, 5, 3), np.uint8), "map": map(str, ())}


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_input_gives_no_rows(kind, client, local):
    empty = EMPTY[kind]
    for one in (client, local):
        for found, columns in (
            (one.embed_images(empty), 32),
            (one.embed_texts([]), 32),
            (one.classify(empty, LABELS), 2),
            (ZeroShotClassifier(one, LABELS).classify(empty), 2),
        ):
            assert found.shape == (0, columns)
            assert found.dtype == np.float32
        assert rank(one, empty, LABELS) == []
        assert caption(one, empty, [Category(name="pet", words=tuple(LABELS))]) == []


def test_tasks_take_one_image_and_one_text(client, local):
    data = encoded(1)
    scores = [one.classify(io.BytesIO(data), iter(LABELS)) for one in (client, local)]
    assert scores[0].shape == scores[1].shape == (1, 2)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    for one in (client, local):
        classifier = ZeroShotClassifier(one, pandas.Series(LABELS))
        assert classifier.labels == tuple(LABELS)
        np.testing.assert_allclose(classifier.classify(data), scores[1], atol=1e-4)
        assert [part.shape for part in classifier.batches(data)] == [(1, 2)]
        assert len(classifier.top_k(data, 1)) == 1
        assert len(rank(one, data, iter(LABELS))) == 1
        assert len(answer(one, memoryview(data), "it is", np.array(LABELS))) == 2
        assert len(caption(one, data, iter([Category(name="pet", words=tuple(LABELS))]))) == 1
        np.testing.assert_array_equal(one.embed_texts("a cat"), one.embed_texts(["a cat"]))
        assert one.embed_texts(text for text in LABELS).shape == (2, 32)


LONG = "y" * 1_700_000
BAD_IMAGES = {
    "float": np.zeros((3, 8, 8), np.float32),
    "channels first": np.zeros((3, 8, 9), np.uint8),
    "none": None,
    "list": [encoded(0)],
    "missing": Path("/nowhere/x.jpg"),
    "missing str": "/nowhere/x.jpg",
    "long": LONG,
    "data URI": f"data:image/png;base64,{LONG}",
    "bytes": b"no image",
    "damaged base64": base64.b64encode(encoded(0)[:-200]).decode(),
    "text file": io.StringIO("text"),
    "no pixels": np.zeros((0, 3, 3), np.uint8),
    "truncated": encoded(3)[:-200],
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_is_the_same_error(kind, client, local):
    for before in (0, 3):
        images = [encoded(0)] * before + [BAD_IMAGES[kind], b"another bad one"]
        mine, other = (raised(one.embed_images, images) for one in (client, local))
        assert mine == other
        assert mine[0] is ImageError
        assert (mine[1]["kind"], mine[1]["index"]) == ("images", before)
        assert len(mine[1]["reason"]) < 1000


def test_first_bad_image_is_reported_whoever_finds_it(client, local):
    """The server finds the first, the client the second."""
    images = [encoded(0), encoded(3)[:-200], Path("/nowhere/x.jpg")]
    mine, other = (raised(one.embed_images, images) for one in (client, local))
    assert mine == other
    assert mine[1]["index"] == 1


BAD_TEXTS = {
    "bytes": b"a cat",
    "none": None,
    "number": 3.5,
    "empty": " ",
    "surrogate": "a\ud800",
    "nul": "a\0",
    "long": "word " * 500,
    "very long": LONG,
    "lines": "a\n" * 200,
    "tokens": "猫" * 200,
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_text_is_the_same_error(kind, client, local):
    for before in (0, 3):
        texts = ["a cat"] * before + [BAD_TEXTS[kind], "", b"x"]
        mine, other = (raised(one.embed_texts, texts) for one in (client, local))
        assert mine == other
        assert issubclass(mine[0], TextError)
        assert (mine[1]["kind"], mine[1]["index"]) == ("texts", before)
        assert len(mine[1]["reason"]) < 1000


BAD_LABELS = ["cat", [], {"cat"}, {"a": "cat"}, b"cat", 7, [7], [LONG]]


@pytest.mark.parametrize("labels", BAD_LABELS, ids=range(len(BAD_LABELS)))
def test_bad_labels_are_the_same_error(labels, client, local):
    mine, other = (raised(one.classify, encoded(0), labels) for one in (client, local))
    assert mine == other
    assert len(str(mine[1])) < 1000


def test_bad_argument_is_the_same_error(client, local):
    for images in (None, {"a": encoded(0)}, {encoded(0)}, 7):
        mine, other = (raised(one.embed_images, images) for one in (client, local))
        assert mine == other
    for texts in (None, {"a": "b"}, b"a cat"):
        mine, other = (raised(one.embed_texts, texts) for one in (client, local))
        assert mine == other


def test_urls_need_a_fetch_function(server, tiny_bundle):
    url = "https://example.com/cat.jpg"
    with ClipClient(server.grpc_url) as client, LocalClip(tiny_bundle.path) as local:
        mine, other = (raised(one.embed_images, url) for one in (client, local))
    assert mine == other
    assert "fetch=" in mine[1]["advice"]


LONG_TEXTS = {
    "Chinese": "猫坐在红色的垫子上，看着窗外的雨。" * 300,
    "bytes": "a cat sat on the mat. " * 5000,
    "lines": "two cats\n" * 3000,
    "word": "cat" * 5000,
    "surrogates": "\ud83d\ude00" * 3000,
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_truncate_cuts_any_text(kind, client, local):
    text = LONG_TEXTS[kind]
    mine, other = (one.embed_texts(["a cat", text], truncate=True) for one in (client, local))
    np.testing.assert_allclose(mine, other, atol=1e-5)
    np.testing.assert_allclose(mine[0], local.embed_texts("a cat")[0], atol=1e-5)
    mine, other = (raised(one.embed_texts, text) for one in (client, local))
    assert mine == other


def test_server_truncates_texts_over_its_limits(client, local):
    """A request of another client, which did not cut the text."""
    for text in LONG_TEXTS.values():
        joined = text.encode("utf-16", "surrogatepass").decode("utf-16")
        tensor = client._strings("text", [joined.encode()], 1)
        embedded = client._calls.infer("clip_text_truncate", [tensor], "text_embeds", (1, 32))
        np.testing.assert_allclose(embedded, local.embed_texts(text, truncate=True), atol=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_iterator_is_read_only_as_far_as_requests_can_begin(server, protocol):
    ahead, finished, lock = [], 0, threading.Lock()

    def images():
        for index in range(60):
            with lock:
                ahead.append(index - finished)
            yield encoded(index)

    url = getattr(server, f"{protocol}_url")
    with ClipClient(url, batch_size=2, in_flight=3) as client:
        infer = client._calls.infer

        def counted(*arguments, **options):
            nonlocal finished
            result = infer(*arguments, **options)
            time.sleep(0.01)
            with lock:
                finished += 2
            return result

        client._calls.infer = counted
        assert client.embed_images(images()).shape == (60, 32)
    assert 2 <= max(ahead) <= 2 * 3 + 2


def test_error_of_an_iterator_passes_through(client, local):
    def images():
        yield encoded(0)
        raise KeyError("no more")

    for one in (client, local):
        with pytest.raises(KeyError, match="no more"):
            one.embed_images(images())


def test_large_array_is_no_larger_than_its_pixels(client, local):
    """As a PNG, this noise would exceed the limit on encoded images."""
    noise = np.random.default_rng(0).integers(0, 256, (3600, 3600, 3), np.uint8)
    np.testing.assert_allclose(client.embed_images(noise), local.embed_images(noise), atol=1e-5)
