"""Tests of every limit in `serving.limits`.

Input at the limit is accepted. Input one past the limit is rejected with a message that names both
the value and the limit.
"""

import contextlib
import io
import os
import time
import tracemalloc

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from serving import limits
from serving.bulk.sources import Shard, Source, read_shard
from serving.bundles.manifest import ImageSpec
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import ImageError, InputError, TextError
from serving.inputs.decode import decode, read_image
from serving.inputs.image_metadata import pixel_parts
from serving.inputs.images import opened
from serving.inputs.labels import LabelSet
from serving.inputs.preprocess import preprocess
from serving.inputs.tokenizer import Tokenizer
from serving.search.build import build
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from serving.util.directories import SUFFIXES
from tests.support import hostile_inputs as hostile
from tests.support.fuzzing import bmp_rle, encoded, image_files

SOAK = bool(os.environ.get("CLIP_SOAK"))  # adds the 64-megapixel images: minutes, 1.5 GB
BATCH = 8
PROTOCOLS = ("grpc", "http")
SMALL = encoded(Image.new("RGB", (16, 16), "red"), "PNG")
LARGE = hostile.padded(SMALL, limits.MAX_IMAGE_BYTES)  # data after the end of a PNG is not read
SPEC = ImageSpec(
    size=224,
    resize=224,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    pipeline="openai",
)


@pytest.fixture(scope="module")
def tokenize(fp32_bundle):
    return Tokenizer(fp32_bundle.tokenizer, fp32_bundle.manifest.text)


@pytest.fixture(scope="module")
def local(fp32_bundle):
    with LocalClip(fp32_bundle.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(fp32_bundle, tmp_path_factory):
    repository = tmp_path_factory.mktemp("limits") / "repository"
    assemble(fp32_bundle, repository, runner="onnxruntime:fp32", max_batch_size=BATCH)
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


# ------------------------------------------------------------------ images

NOISE = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
FEW_PARTS = hostile.chunks_of(SMALL)
FEW_MARKERS = hostile.markers_of(hostile.jpeg_with([]))
AT = {
    "bytes": LARGE,
    "pixels": encoded(Image.new("1", (8192, 8192)), "PNG"),
    "chunks": hostile.png_with([hostile.png_chunk(b"teXt")] * (limits.MAX_PARTS - FEW_PARTS)),
    "segments": hostile.jpeg_with([(0xFE, b"")] * (limits.MAX_PARTS - FEW_MARKERS)),
    "blocks": hostile.gif_with(limits.MAX_PARTS - 1, 1),
    "scans": hostile.jpeg_with_scans(limits.MAX_SCANS),
    "tables": hostile.jpeg_tables(limits.MAX_JPEG_HEADER_BYTES),
    "run-length": bmp_rle(1024, 1024),
}
PAST = {
    "bytes": (LARGE + b"\0", "has 33554433 bytes, more than the 33554432 allowed"),
    "pixels": (
        encoded(Image.new("1", (8193, 8192)), "PNG"),
        "8193 x 8192 pixels, more than the 67108864 allowed",
    ),
    "chunks": (
        hostile.png_with([hostile.png_chunk(b"teXt")] * (limits.MAX_PARTS - FEW_PARTS + 1)),
        "the PNG has more than the 20000 chunks allowed",
    ),
    "segments": (
        hostile.jpeg_with([(0xFE, b"")] * (limits.MAX_PARTS - FEW_MARKERS + 1)),
        "the JPEG has more than the 20000 segments allowed",
    ),
    "blocks": (
        hostile.gif_with(limits.MAX_PARTS, 1),
        "the GIF has more than the 20000 blocks before its first frame allowed",
    ),
    "scans": (hostile.jpeg_with_scans(51), "the JPEG has more than the 50 scans allowed"),
    "tables": (
        hostile.jpeg_tables(limits.MAX_JPEG_HEADER_BYTES + 1),
        "131073 bytes of tables before its first scan, more than the 131072 allowed",
    ),
    "run-length": (bmp_rle(1025, 1024), "1025 x 1024 pixels, more than the 1048576 allowed"),
}


@pytest.mark.parametrize("limit", AT)
def test_image_at_a_limit_is_accepted_and_past_it_rejected(limit):
    assert preprocess(AT[limit], SPEC).shape == (3, 224, 224)
    data, message = PAST[limit]
    with pytest.raises(ImageError, match=message):
        preprocess(data, SPEC)


@pytest.mark.parametrize("pixels", [limits.MAX_PIXELS, limits.MAX_PIXELS + 1])
def test_pixel_limit_applies_to_arrays_and_pil_images(pixels):
    for picture in (Image.new("1", (pixels, 1)), np.zeros((1, pixels, 3), np.uint8)):
        if pixels <= limits.MAX_PIXELS:
            assert preprocess(picture, SPEC).shape == (3, 224, 224)
            continue
        with pytest.raises(ImageError, match="67108865 x 1 pixels, more than the 67108864 allowed"):
            preprocess(picture, SPEC)


def test_exactly_five_formats_are_decoded():
    assert limits.FORMATS == ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    image = Image.fromarray(NOISE)
    for kind in limits.FORMATS:
        assert decode(encoded(image, kind)).size == (64, 48)
    others = ("TIFF", "PPM", "ICO", "TGA", "DIB", "PCX", "JPEG2000", "AVIF")
    for kind in others:
        with pytest.raises(ImageError, match="expected one of JPEG, PNG, WEBP, GIF, BMP, got"):
            decode(encoded(image, kind))
    jpeg, png = {".jpg", ".jpeg", ".jpe", ".jfif"}, {".png", ".apng"}
    assert set(SUFFIXES) == {*jpeg, *png, ".webp", ".gif", ".bmp"}


@pytest.mark.parametrize("name", image_files())
def test_removing_metadata_changes_no_pixel(name):
    data = image_files()[name]
    whole, cut = (Image.open(io.BytesIO(part)) for part in (data, pixel_parts(data)))
    assert whole.tobytes() == cut.tobytes()
    assert (whole.mode, whole.info.get("transparency")) == (cut.mode, cut.info.get("transparency"))
    said = {"exif", "icc_profile", "comment", "xmp", "mp", "extension"}
    assert name.startswith(("webp", "bmp")) or not said & cut.info.keys()


def test_data_after_a_jpeg_does_not_count_as_scans():
    """Motion photos and multi-image files have a video or more images after the first image."""
    photo = hostile.jpeg_with([])
    assert decode(photo + b"\0\xff\xda" * 5000 + photo).size == (16, 16)
    assert pixel_parts(photo + b"a film") == pixel_parts(photo)


def test_oversized_file_is_rejected_without_reading_it(tmp_path):
    huge, at, past = (tmp_path / f"{name}.png" for name in ("huge", "at", "past"))
    for path, size in ((huge, 10 << 30), (at, limits.MAX_IMAGE_BYTES)):
        path.write_bytes(SMALL)
        os.truncate(path, size)
    past.write_bytes(LARGE + b"\0")
    assert len(read_image(at)) == limits.MAX_IMAGE_BYTES
    tracemalloc.start()
    for path, size in ((huge, 10 << 30), (past, limits.MAX_IMAGE_BYTES + 1)):
        with pytest.raises(ImageError, match=rf"{path}: .* {size} bytes, more than the 33554432"):
            read_image(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(ImageError, match="is a device, not a file"):
        read_image("/dev/zero")


def test_client_rejects_an_encoded_image_above_the_limit():
    assert opened(LARGE).content is LARGE
    with pytest.raises(ImageError, match="33554433 bytes, more than the 33554432"):
        opened(LARGE + b"\0")


def test_oversized_image_does_not_stop_a_job(tmp_path, local, tar_of_pictures):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "fine.png").write_bytes(SMALL)
    (folder / "huge.png").touch()
    os.truncate(folder / "huge.png", 10 << 30)
    outcome = build(folder, tmp_path / "index", local)
    (skipped,) = outcome.manifest.skipped
    assert outcome.manifest.count == 1
    assert "10737418240 bytes, more than the 33554432 allowed" in skipped.reason.lower()
    source = Source(location=str(tar_of_pictures), kind="webdataset")
    rows = dict(read_shard(source, Shard(files=(tar_of_pictures.name,))))
    assert [isinstance(row, InputError) for row in rows.values()] == [False, True, False]
    assert "33554433 bytes, more than" in rows[f"{tar_of_pictures.name}/large.png"].reason
    with pytest.raises(ImageError, match=r"images\[1\].*huge\.png.* 10737418240 bytes"):
        local.embed_images([folder / "fine.png", folder / "huge.png"])


@pytest.fixture
def tar_of_pictures(tmp_path):
    import tarfile

    path = tmp_path / "pictures.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.png", SMALL), ("large.png", LARGE + b"\0"), ("z.png", SMALL)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


# ------------------------------------------------------------------ texts

BYTES, WORD = limits.MAX_TEXT_BYTES, limits.MAX_WORD
TEXTS = {
    "bytes": ("a " * (BYTES // 2), "a " * (BYTES // 2) + "b", "has 8193 bytes, more than the 8192"),
    "bytes, not characters": (
        "é " * (BYTES // 3),
        "é " * (BYTES // 3) + "ééé",
        r"has 819\d bytes, more than the 8192",
    ),
    "a word": ("x" * WORD, "x" * (WORD + 1), "has 1001 characters without whitespace, more than"),
    "a word with control characters": (
        "é" + "x" * 599 + "\x0b" + "x" * 400,
        "é" + "x" * 600 + "\x0b" + "x" * 400,
        "has 1001 characters without whitespace, more than the 1000",
    ),
    "lines": ("é\n" * 99 + "a", "é\n" * 100 + "a", "has 101 lines, more than the 100 allowed"),
    "HTML": ("&" + "amp;" * 8, "&" + "amp;" * 9, "escaped more than 8 times"),
}


@pytest.mark.parametrize("limit", TEXTS)
def test_text_at_a_limit_is_accepted_and_past_it_rejected(limit, tokenize):
    at, past, message = TEXTS[limit]
    assert tokenize([at], truncate=True).shape[0] == 1
    for texts in ([past], ["a", past]):
        with pytest.raises(TextError, match=rf": the text .*{message}") as refused:
            tokenize(texts)
        assert (refused.value.kind, refused.value.index) == ("texts", len(texts) - 1)


def test_very_long_character_reference_is_handled(tokenize):
    """`html.unescape()` calls `int()`, which raises ValueError above 4,300 digits."""
    with pytest.raises(TextError, match="5002 characters without whitespace"):
        tokenize(["&#" + "9" * 5000])
    assert tokenize(["&#" + "9" * (WORD - 2)]).shape[0] == 1


# ------------------------------------------------------------------ label sets


def labels(count):
    return tuple(str(index) for index in range(count))


def templates(count):
    return tuple(f"{index} {{}}" for index in range(count))


LONG = tuple(f"{index:4}" + "x" * 4092 for index in range(1024))
SETS = {
    "labels": (
        (labels(50_000), templates(1)),
        (labels(50_001), templates(1)),
        "50001 labels are more than the 50000 allowed",
    ),
    "templates": (
        (labels(1), templates(1000)),
        (labels(1), templates(1001)),
        "1001 templates are more than the 1000 allowed",
    ),
    "texts": (
        (labels(1000), templates(200)),
        (labels(1000), templates(201)),
        "1000 labels x 201 templates are 201000 texts, more than the 200000 allowed",
    ),
    "bytes of a text": (
        (("a", "b" * 8), ("{}" * 1024,)),
        (("a", "b" * 8), ("{}" * 1024 + "c",)),
        r"labels\[1\]: in prompt template '\{\}.*, the label has 8193 bytes, more than",
    ),
    "bytes of all": (
        (LONG, ("{}",) * 8),
        (LONG, ("{}",) * 7 + ("a{}",)),
        "labels x templates have 33555456 bytes, more than the 33554432 allowed",
    ),
}


@pytest.mark.parametrize("limit", SETS)
def test_label_set_at_a_limit_is_accepted_and_past_it_rejected(limit):
    at, past, message = SETS[limit]
    made = LabelSet(*at)
    assert len(made.texts(0, 3)) == min(3, len(made))
    assert max(len(text.encode()) for text in made.texts(0, 1000)) <= limits.MAX_TEXT_BYTES
    with pytest.raises(TextError, match=message):
        LabelSet(*past)


def test_both_clients_reject_an_oversized_label_set(local, server):
    with ClipClient(server.grpc_url) as client:
        for embedder in (local, client):
            with pytest.raises(TextError, match="201000 texts, more than the 200000 allowed"):
                embedder.classify([SMALL], labels(1000), templates(201))


# ------------------------------------------------------------------ the server


def ask(server, protocol, model, output, **inputs):
    """Send a request without `ClipClient`, which would reject the input itself."""
    module = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
    url = getattr(server, f"{protocol}_url").partition("://")[2]
    tensors = []
    for name, items in inputs.items():
        shape = [len(items)] if model == "clip_zero_shot" else [len(items), 1]
        data = [item if isinstance(item, bytes) else item.encode() for item in items]
        tensors.append(module.InferInput(name, shape, "BYTES"))
        tensors[-1].set_data_from_numpy(np.array(data, np.object_).reshape(shape))
    with module.InferenceServerClient(url) as client:
        return client.infer(model, tensors).as_numpy(output)


def zero_shot(given):
    return {"IMAGE": [SMALL], "LABELS": ["cat", "dog"]} | given


SERVED = {
    **{
        f"picture: {limit}": ("clip_image", {"image": [AT[limit]]}, {"image": [data]}, message)
        for limit, (data, message) in PAST.items()
        if limit != "pixels" or SOAK
    },
    **{
        f"text: {limit}": ("text_tokenize", None, {"text": ["a", past]}, message)
        for limit, (_, past, message) in TEXTS.items()
    },
    **{
        f"set: {limit}": (
            "clip_zero_shot",
            None,
            zero_shot({"LABELS": past[0], "TEMPLATES": past[1]}),
            message,
        )
        for limit, (_, past, message) in SETS.items()
    },
    "a label": (
        "clip_zero_shot",
        None,
        zero_shot({"LABELS": ["cat", "d" * (BYTES + 1)]}),
        r"labels\[1\]: the text has 8193 bytes, more than the 8192 allowed",
    ),
    "pictures of a set": (
        "clip_zero_shot",
        zero_shot({"IMAGE": [SMALL] * limits.MAX_CLASSIFIED}),
        zero_shot({"IMAGE": [SMALL] * (limits.MAX_CLASSIFIED + 1)}),
        "257 images are more than the 256 allowed in a request",
    ),
    "pictures of a batch": (
        "clip_image",
        {"image": [SMALL] * BATCH},
        {"image": [SMALL] * (BATCH + 1)},
        f"batch-size must be <= {BATCH}",
    ),
    "texts of a batch": (
        "clip_text",
        {"text": ["a cat"] * BATCH},
        {"text": ["a cat"] * (BATCH + 1)},
        f"batch-size must be <= {BATCH}",
    ),
}
OUTPUTS = {
    "clip_image": "image_embeds",
    "clip_text": "text_embeds",
    "text_tokenize": "input_ids",
    "clip_zero_shot": "PROBABILITIES",
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("limit", SERVED)
def test_server_enforces_the_same_limits(server, protocol, limit):
    model, at, past, message = SERVED[limit]
    with pytest.raises(InferenceServerException, match=message) as refused:
        ask(server, protocol, model, OUTPUTS[model], **past)
    assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    if at is not None:
        assert len(ask(server, protocol, model, OUTPUTS[model], **at))


# ------------------------------------------------------------------ worst-case CPU time


def seconds(function, *arguments):
    """CPU time of a call in seconds. Other load on the machine does not affect it."""
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


def decoded(data):
    with contextlib.suppress(ImageError):
        preprocess(data, SPEC)


def told(times, unit):
    name = max(times, key=times.get)
    scale = {"s": 1, "ms": 1000}[unit]
    return f"{times[name] * scale:.1f} {unit} of CPU ({name}) of {len(times)} kinds"


def test_slowest_images_within_the_limits_decode_in_time(figure):
    """An image with much metadata is rejected or costs no more than its pixels. Loose bounds."""
    bombs = hostile.small_bombs().items()
    times = {name: min(seconds(decoded, data) for _ in range(2)) for name, data in bombs}
    figure("worst decode within the limits, small pictures", told(times, "ms"))
    assert max(times.values()) < 10
    if SOAK:
        times = {}
        for name, made in hostile.large_bombs().items():
            data = made()
            assert len(data) <= limits.MAX_IMAGE_BYTES
            times[name] = seconds(decoded, data)
        figure("worst decode within the limits, 64 megapixels", told(times, "s"))
        assert max(times.values()) < 120


def test_slowest_texts_within_the_limits_tokenize_in_time(figure, tokenize):
    times = {}
    for name, text in hostile.slow_texts().items():
        assert len(text.encode()) <= limits.MAX_TEXT_BYTES

        def taken(text=text):
            with contextlib.suppress(TextError):
                tokenize([text], truncate=True)

        times[name] = min(seconds(taken) for _ in range(3))
    figure("worst tokenizing within the limits", told(times, "ms"))
    assert max(times.values()) < 5
