"""End-to-end tests of `ClipClient` on a real Triton server."""

import io
import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import ImageError, ServerError, TextError
from serving.runners.registry import open_runner
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.servers import BAD_PICTURES, encoded, metric

PROTOCOLS = ("grpc", "http")


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    repository = tmp_path_factory.mktemp("served") / "repository"
    assemble(tiny_bundle, repository, runner="onnxruntime:fp32", max_batch_size=16)
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


@pytest.fixture(scope="module", params=PROTOCOLS)
def client(server, request):
    with ClipClient(getattr(server, f"{request.param}_url")) as opened:
        yield opened


@pytest.fixture(scope="module")
def local(tiny_bundle):
    with LocalClip(tiny_bundle.path) as opened:
        yield opened


# ------------------------------------------------------------------ valid inputs


def test_served_embeddings_equal_in_process_embeddings(client, local):
    pictures = [encoded(i, form) for i in range(9) for form in ("JPEG", "PNG")]
    served = client.embed_images(pictures)
    assert served.dtype == np.float32
    assert served.shape == (18, 32)
    np.testing.assert_allclose(np.linalg.norm(served, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(served, local.embed_images(pictures), atol=1e-4)
    texts = [
        "a cat",
        "two dogs on a very long bench in the sun",
        "Ünïcödé &amp; <b>html</b> 🐈",
    ] * 5
    np.testing.assert_allclose(client.embed_texts(texts), local.embed_texts(texts), atol=1e-4)


def test_all_image_types_give_the_same_embedding(client, tmp_path):
    data = encoded(1, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    image = Image.open(io.BytesIO(data))
    forms = [data, path, str(path), image, np.asarray(image)]
    embeddings = client.embed_images(forms)
    assert np.abs(embeddings - embeddings[0]).max() < 1e-6


def test_order_is_kept_over_many_concurrent_requests(server, local):
    pictures = [encoded(i) for i in range(60)]
    with ClipClient(server.grpc_url, batch_size=3, in_flight=6) as client:
        np.testing.assert_allclose(
            client.embed_images(pictures), local.embed_images(pictures), atol=1e-4
        )


def test_large_images_are_sent_in_several_requests(server, local):
    """A batch of photos would exceed the limit of a gateway, and keep one process busy."""
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    photo = buffer.getvalue()  # 3 MB: two in a request
    images = [encoded(0), photo, photo, photo, encoded(1), photo, photo]
    before = metric(server, "nv_inference_request_success", "image_preprocess")
    with ClipClient(server.grpc_url, batch_size=16) as client:
        found = client.embed_images(images)
        np.testing.assert_allclose(found, local.embed_images(images), atol=1e-4)
        assert metric(server, "nv_inference_request_success", "image_preprocess") - before == 3
        with pytest.raises(ImageError) as bad:
            client.embed_images([*images, photo[:-1000], photo])
    assert bad.value.index == len(images)


def test_client_can_be_shared_between_threads(client, local):
    pictures = [encoded(i) for i in range(8)]
    expected = local.embed_images(pictures)
    with ThreadPoolExecutor(4) as pool:
        for index, embedding in enumerate(pool.map(lambda p: client.embed_images([p]), pictures)):
            np.testing.assert_allclose(embedding[0], expected[index], atol=1e-4)


def test_classify_equals_in_process_classify(client, local):
    pictures, labels = [encoded(i) for i in range(4)], ["a cat", "a dog", "a tree"]
    served = client.classify(pictures, labels)
    np.testing.assert_allclose(served.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(served, local.classify(pictures, labels), atol=1e-4)
    other = client.classify(pictures, labels, ["a drawing of a {}", "{}"])
    assert np.abs(other - served).max() > 1e-4


def test_texts_are_cached_and_errors_are_not(server):
    hits = lambda: metric(server, "nv_cache_num_hits_per_model", "clip_text")  # noqa: E731
    with ClipClient(server.grpc_url) as client:
        first, before = client.embed_texts(["a label nobody asked for yet"]), hits()
        assert np.array_equal(client.embed_texts(["a label nobody asked for yet"]), first)
        assert hits() == before + 1
        for _ in range(3):
            with pytest.raises(TextError, match="more than the model's 77"):
                client.embed_texts(["word " * 500])


# ------------------------------------------------------------------ invalid inputs


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_errors_name_the_bad_image(client, kind):
    data, message = BAD_PICTURES[kind]
    with pytest.raises(ImageError, match=rf"images\[10\]: .*({message})"):
        client.embed_images([encoded(i) for i in range(10)] + [data] + [encoded(1)])
    assert client.embed_images([encoded(0)]).shape == (1, 32)


def test_extreme_aspect_ratio_and_animation_are_accepted(client, local):
    wide, frames = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (6000, 1), "red").save(wide, "PNG")
    first, second = Image.new("P", (40, 40), 3), Image.new("P", (40, 40), 200)
    first.save(frames, "GIF", save_all=True, append_images=[second])
    pictures = [wide.getvalue(), frames.getvalue()]
    np.testing.assert_allclose(
        client.embed_images(pictures), local.embed_images(pictures), atol=1e-4
    )


def test_invalid_images_are_rejected_before_sending(client):
    with pytest.raises(ImageError, match=r"images\[1\].*/nowhere/x\.jpg"):
        client.embed_images([encoded(0), Path("/nowhere/x.jpg")])
    with pytest.raises(ImageError, match=r"uint8 \[height, width\] .*got float64 \[4, 4\]"):
        client.embed_images([np.zeros((4, 4))])


BAD_TEXTS = {
    "empty": ("", "empty"),
    "blank": (" \t\n", "empty"),
    "nul": ("a\0b", "NUL character at position 1"),
    "surrogate": ("a\ud800", "surrogate"),
    "long": ("word " * 500, "502 tokens.*more than the model's 77"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_errors_name_the_bad_text(client, kind):
    text, message = BAD_TEXTS[kind]
    with pytest.raises(TextError, match=rf"texts\[9\].*{message}"):
        client.embed_texts([f"text {i}" for i in range(9)] + [text])


def test_truncate_shortens_a_long_text(client, local):
    long = "word " * 500
    expected = local.embed_texts([" ".join(["word"] * 75)])
    np.testing.assert_allclose(client.embed_texts([long], truncate=True), expected, atol=1e-4)
    with pytest.raises(TextError, match="more than the model's 77"):  # not the cached answer
        client.embed_texts([long])


TENSORS = {"image": ("pixels", "image_embeds"), "text": ("input_ids", "text_embeds")}


def answers_at_once(server, modality: str, rows: list) -> list:
    """Send all rows to one tower before waiting for an answer. Return embeddings or errors."""
    given, asked = TENSORS[modality]
    answers: list = [None] * len(rows)
    done = threading.Semaphore(0)
    with tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as raw:

        def keep(index):
            def callback(result, error):
                answers[index] = error or result.as_numpy(asked)
                done.release()

            return callback

        for index, row in enumerate(rows):
            tensor = tritonclient.grpc.InferInput(given, row.shape, np_to_triton_dtype(row.dtype))
            tensor.set_data_from_numpy(row)
            raw.async_infer(f"{modality}_tower", [tensor], keep(index))
        for _ in rows:
            assert done.acquire(timeout=30)
    return answers


def test_bad_request_in_a_dynamic_batch_fails_alone(server, tiny_bundle):
    """Requests go directly to the tower, so that they share one dynamic batch."""
    spec = tiny_bundle.manifest.text
    rows = []
    for first in range(8):
        row = np.full((1, 16), spec.end_id, np.int32)
        row[0, :3] = (spec.start_id, 320 + first, spec.end_id)
        rows.append(row)
    rows[3][0, 1] = spec.vocab_size + 5
    rows[5][:] = 7
    answers = answers_at_once(server, "text", rows)
    assert isinstance(answers[3], InferenceServerException)
    assert "expected 0 to 49407" in str(answers[3])
    assert isinstance(answers[5], InferenceServerException)
    assert "lack the end-of-text token" in str(answers[5])
    for index in (0, 1, 2, 4, 6, 7):
        assert answers[index].shape == (1, 32)


def test_images_share_batches(server, tiny_bundle):
    side = tiny_bundle.manifest.image.size
    pixels = np.random.default_rng(0).integers(0, 256, (100, 3, side, side), np.uint8)
    # Full batches keep the tower busy, so that the single rows queue up behind them.
    rows = [pixels[first : first + 16] for first in (0, 16, 32, 48)]
    rows += [pixels[place : place + 1] for place in range(64, 100)]
    with open_runner(tiny_bundle, "image", "onnxruntime:fp32") as runner:
        expected = runner.run(pixels)
    before = metric(server, "nv_inference_exec_count", "image_tower")
    answers = answers_at_once(server, "image", rows)
    np.testing.assert_allclose(np.concatenate(answers), expected, atol=1e-5)
    assert metric(server, "nv_inference_exec_count", "image_tower") - before < len(rows) - 10


def test_texts_of_all_lengths_share_batches(server, tiny_bundle):
    """Neighboring requests differ in length; a batcher of equal shapes would run each alone."""
    spec = tiny_bundle.manifest.text
    full = np.full((16, spec.context_length), spec.end_id, np.int32)
    rows = [full] * 4  # keep the tower busy, so that the single rows queue up
    for place in range(36):
        row = np.full((1, spec.buckets[place % len(spec.buckets)]), spec.pad_id, np.int32)
        row[0, :3] = (spec.start_id, 320 + place, spec.end_id)
        rows.append(row)
    with open_runner(tiny_bundle, "text", "onnxruntime:fp32") as runner:
        expected = np.concatenate([runner.run(row) for row in rows])
    before = metric(server, "nv_inference_exec_count", "text_tower")
    answers = answers_at_once(server, "text", rows)
    np.testing.assert_allclose(np.concatenate(answers), expected, atol=1e-5)
    assert metric(server, "nv_inference_exec_count", "text_tower") - before < len(rows) - 10


def test_deadline_is_enforced(server):
    with (
        ClipClient(server.grpc_url, timeout=0.001) as client,
        pytest.raises(ServerError, match=r"within 0\.001 s|timeout"),
    ):
        client.embed_images([encoded(i, size=(2000, 2000)) for i in range(8)])


def test_unreachable_server_and_malformed_url_are_reported():
    with pytest.raises(ServerError, match="no Triton server answers at grpc://127"):
        ClipClient("grpc://127.0.0.1:1")
    with pytest.raises(ServerError, match="expected grpc://host:port or http://host:port"):
        ClipClient("localhost:8001")


# ------------------------------------------------------------------ commands


def serving(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving", *arguments], capture_output=True, text=True, timeout=120
    )


def test_commands_work_with_a_server(server, tiny_bundle, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(i))
    labels = ["--label", "a cat", "--label", "a dog"]
    done = serving("classify", str(tmp_path), *labels, "--url", server.http_url, "--json")
    assert done.returncode == 0, done.stderr
    served = json.loads(done.stdout.splitlines()[-1])["images"]
    assert [Path(row["image"]).name for row in served] == ["0.jpg", "1.jpg", "2.jpg"]
    local = serving("classify", str(tmp_path), *labels, "--bundle", str(tiny_bundle.path))
    assert local.returncode == 0, local.stderr
    best = max(served[0]["probabilities"].items(), key=lambda item: item[1])
    assert f"{best[0]}" in local.stdout

    output = tmp_path / "embeddings.npz"
    done = serving(
        "embed",
        str(tmp_path),
        "--text",
        "a cat",
        "--url",
        server.grpc_url,
        "--output",
        str(output),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shape"] == [4, 32]
    with np.load(output) as saved:
        assert saved["embeddings"].shape == (4, 32)
        assert saved["names"][-1] == "a cat"

    done = serving("status", "--url", server.grpc_url, "--json")
    assert json.loads(done.stdout)["facts"]["model"] == tiny_bundle.manifest.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "x.jpg", "--label", "a"), "expected either --url"),
        (("embed", "--url", "grpc://127.0.0.1:1", "--text", "a"), "no Triton server answers"),
        (("embed", "--url", "grpc://127.0.0.1:1"), "nothing to embed"),
        (("assemble", "/nowhere"), "is not a bundle"),
        (("up", "/nowhere"), "expected a model repository"),
    ],
)
@pytest.mark.wording
def test_command_errors_are_printed_without_traceback(arguments, message):
    done = serving(*arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
