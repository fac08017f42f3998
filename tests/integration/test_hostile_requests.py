"""Tests of requests that could hurt other clients, and of the counters of outcomes."""

import http.client
import io
import json
import struct
import threading
import time
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import ImageError, OverloadedError, TextTooLongError
from serving.limits import LARGE_PIXELS
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.servers import encoded, wait_until

RUNNER = "onnxruntime:fp32"
PROTOCOLS = ("http", "grpc")
SMALL = encoded(0)


@pytest.fixture(scope="module")
def server(fp32_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "repository"
    assemble(fp32_bundle, path, runner=RUNNER)
    with TritonServer(path, http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


@pytest.fixture(scope="module")
def local(fp32_bundle):
    with LocalClip(fp32_bundle.path, RUNNER) as opened:
        yield opened


def post(server, model, headers, body):
    """Return the status and the body of the answer; None if the connection was closed."""
    address = server.http_url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (ConnectionError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def ask_text(server, protocol, text, shape, model="clip_text", **outputs):
    """Send one text with any shape. Return the shape and the data of the embedding, or None."""
    data = struct.pack("<I", len(text)) + text
    if protocol == "http":
        given = {"name": "text", "shape": shape, "datatype": "BYTES"}
        given["parameters"] = {"binary_data_size": len(data)}
        document = {"inputs": [given]} | outputs
        head = json.dumps(document).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        status, answer = post(server, model, headers, head + data)
        if status != 200:
            return None
        (output,) = json.loads(answer)["outputs"]
        return output["shape"], np.array(output["data"])
    with tritonclient.grpc.InferenceServerClient(server.grpc_url.partition("://")[2]) as client:
        tensor = tritonclient.grpc.InferInput("text", shape, "BYTES")
        tensor._raw_content = data  # the shape is not that of an array
        try:
            answer = client.infer(model, [tensor], client_timeout=30)
        except InferenceServerException:
            return None
        found = answer.as_numpy("text_embeds")
        return list(found.shape), found.ravel()


# ------------------------------------------------------------------ the response cache

SHAPES = ([2**32, 1], [3 * 2**32, 1], [-(2**63), 1], [0, 1], [2**32 + 1, 1], [1], [1, 1, 1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", ["clip_text", "clip_text_truncate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_shape_poisons_the_cache(server, local, protocol, model, shape):
    text = f"a cat {shape} {protocol} {model}"
    assert ask_text(server, protocol, text.encode(), shape, model) is None
    found_shape, found = ask_text(server, protocol, text.encode(), [1, 1], model)
    assert found_shape == [1, 32]
    np.testing.assert_allclose(found, local.embed_texts([text])[0], atol=1e-5)


def test_no_parameter_poisons_the_cache(server, local):
    """The cache key includes neither request parameters nor the requested outputs."""
    text = b"a dog that answers requests"
    top = {"outputs": [{"name": "text_embeds", "parameters": {"classification": 2}}]}
    assert ask_text(server, "http", text, [1, 1], **top)[0] != [1, 32]
    shape, found = ask_text(server, "http", text, [1, 1])
    assert shape == [1, 32]
    np.testing.assert_allclose(found, local.embed_texts([text.decode()])[0], atol=1e-5)
    long = b"many words " * 90
    assert ask_text(server, "http", long, [1, 1], parameters={"truncate": True}) is None
    assert ask_text(server, "http", long, [1, 1]) is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncation_is_a_model_of_its_own(server, local, protocol):
    long = f"many {protocol} words " * 90
    with ClipClient(getattr(server, f"{protocol}_url")) as client:
        for _ in range(2):  # embedded, then cached
            found = client.embed_texts([long], truncate=True)
            np.testing.assert_allclose(found, local.embed_texts([long], truncate=True), atol=1e-5)
            with pytest.raises(TextTooLongError):
                client.embed_texts([long])
        short = client.embed_texts(["a cat"], truncate=True)
        np.testing.assert_allclose(short, client.embed_texts(["a cat"]), atol=1e-6)


# ------------------------------------------------------------------ large images


@pytest.fixture(scope="module")
def large():
    """PNG of more than `LARGE_PIXELS`: 60 kB that take a third of a second to decode."""
    side = int(LARGE_PIXELS**0.5) + 64
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_large_images_give_the_same_embedding(server, local, large):
    with ClipClient(server.grpc_url) as client:
        found = client.embed_images([SMALL, large, SMALL])
        np.testing.assert_allclose(found, local.embed_images([SMALL, large, SMALL]), atol=1e-5)
        with pytest.raises(ImageError) as bad:
            client.embed_images([SMALL, large[: len(large) // 2]])
    assert bad.value.index == 1


def test_large_images_do_not_starve_small_ones(server, large, figure):
    """Without a model of their own, they keep every process busy for a second at a time."""
    stop, done, waits = threading.Event(), [], []

    def send():
        with ClipClient(server.grpc_url, attempts=1) as client:
            while not stop.is_set():
                start = time.monotonic()
                try:
                    client.embed_images([large] * 4)
                except OverloadedError:
                    time.sleep(0.05)
                else:
                    done.append(time.monotonic() - start)

    with ClipClient(server.grpc_url) as client:
        client.embed_images([SMALL])
        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 6
        try:
            while time.monotonic() < end:
                start = time.monotonic()
                client.embed_images([SMALL])
                waits.append(time.monotonic() - start)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert done
    p99, one = np.percentile(waits, 99), min(done)
    assert p99 < one / 2, (p99, one)
    figure(
        "large images beside small ones",
        f"4 clients with 4 images of 17 megapixels each: p99 of another client's small image "
        f"{p99 * 1e3:.0f} ms of {len(waits)}; a request with large images takes {one * 1e3:.0f} ms",
    )


# ------------------------------------------------------------------ counters


def counters(server):
    """Return the project's counters: (name, labels) -> value."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("clip_"):
            name, _, rest = line.partition("{")
            labels, _, value = rest.partition("} ")
            pairs = dict(pair.split("=") for pair in labels.replace('"', "").split(","))
            found[name, *sorted(pairs.items())] = float(value)
    return found


def test_counters_tell_bad_input_from_overload_and_faults(server, large):
    before = counters(server)

    def grown(name, **labels):
        key = name, *sorted(labels.items())
        return counters(server)[key] - before[key]

    def requests(model, outcome):
        return grown("clip_requests_total", model=model, outcome=outcome)

    with ClipClient(server.grpc_url, attempts=1, in_flight=1) as client:
        client.embed_images([SMALL, SMALL])
        for _ in range(3):
            with pytest.raises(ImageError):
                client.embed_images([b"junk"])
        client.embed_texts(["a cat", "two cats and a dog"])
        for _ in range(3):
            client.classify([SMALL], ["one label", "another label"])
    rejected = flood_with(server, [large] * 4)
    assert rejected
    wait_until(lambda: requests("image_preprocess", "overloaded") == rejected)
    assert requests("image_preprocess", "invalid") == 3
    assert requests("image_preprocess", "error") == 0
    assert requests("image_tower", "ok") >= 4
    assert requests("image_tower", "invalid") == 0
    assert requests("text_tokenize", "ok") == 1
    assert requests("clip_zero_shot", "ok") == 3
    assert grown("clip_image_bytes_total", model="image_preprocess") == 5 * len(SMALL)
    assert grown("clip_image_pixels_total", model="image_preprocess") == 5 * 64 * 48
    assert grown("clip_text_tokens_total", model="text_tokenize") == 4 + 7
    sets = counters(server)
    assert sets["clip_label_cache_requests_total", ("model", "clip_zero_shot"), ("result", "miss")]
    assert (
        sets["clip_label_cache_requests_total", ("model", "clip_zero_shot"), ("result", "hit")] == 2
    )


def flood_with(server, images):
    """Send more requests than may wait. Return how many were rejected."""
    rejected = []

    def send():
        with ClipClient(server.grpc_url, attempts=1) as client:
            try:
                client.embed_images(images)
            except OverloadedError:
                rejected.append(1)

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(rejected)
