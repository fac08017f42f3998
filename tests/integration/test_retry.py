"""Tests of client retries and backoff, with full, late and restarted servers."""

import io
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image

from serving.clients.retry import pauses, retried
from serving.clients.triton import ClipClient
from serving.errors import InputError, OverloadedError, ServerError, TextError, UnavailableError
from serving.triton.network import choose_ports
from serving.triton.repository import assemble
from serving.triton.server import TritonServer

PROTOCOLS = ("grpc", "http")


def encoded(size):
    grid = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    buffer = io.BytesIO()
    grid.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


# ------------------------------------------------------------------ backoff


def test_pauses_double_up_to_the_maximum():
    longest = list(pauses(8, lambda: 1.0))
    assert longest == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert list(pauses(1)) == []
    assert list(pauses(3, lambda: 0.0)) == [0.0, 0.0]


def test_jitter_covers_the_full_pause():
    """Each pause is uniform between 0 and its maximum, independent of the other pauses."""
    draw = random.Random(0).random
    drawn = np.array([list(pauses(6, draw)) for _ in range(4000)])
    longest = np.array(list(pauses(6, lambda: 1.0)))
    assert (drawn >= 0).all()
    assert (drawn < longest).all()
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        np.testing.assert_allclose(np.quantile(drawn, share, axis=0), share * longest, rtol=0.1)
    assert abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.1


class Server:
    """Fake server that raises `errors` in order and records the time and timeout of each call."""

    def __init__(self, *errors, takes=0.0):
        self.errors, self.takes, self.begin = list(errors), takes, time.monotonic()
        self.asked, self.lefts = [], []

    def ask(self, left):
        self.asked.append(time.monotonic() - self.begin)
        self.lefts.append(left)
        time.sleep(self.takes)
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def test_rejected_requests_are_retried_with_the_remaining_time():
    server = Server(UnavailableError("gone"), OverloadedError("full"), UnavailableError("gone"))
    assert retried(server.ask, 4, 60.0) == "answer"
    assert server.lefts[0] == 60.0
    for asked, left in zip(server.asked[1:], server.lefts[1:], strict=True):
        assert 60 - asked - 0.05 < left <= 60
    assert server.lefts == sorted(server.lefts, reverse=True)
    assert len(server.asked) == 4


@pytest.mark.parametrize("error", [ServerError("late"), TextError("bad"), KeyError("bug")])
def test_other_errors_are_not_retried(error):
    server = Server(error)
    with pytest.raises(type(error)) as caught:
        retried(server.ask, 4, 60.0)
    assert caught.value is error
    assert len(server.asked) == 1


def test_retries_stop_after_the_last_attempt():
    server = Server(*[OverloadedError("full")] * 9)
    with pytest.raises(OverloadedError, match=r"^full \(tried 3 times in 0\.\d s\)$"):
        retried(server.ask, 3, 60.0)
    assert len(server.asked) == 3
    once = OverloadedError("full")
    with pytest.raises(OverloadedError) as caught:
        retried(Server(once).ask, 1, 60.0)
    assert caught.value is once


def test_no_attempt_starts_after_the_deadline():
    server = Server(*[UnavailableError("gone")] * 999, takes=0.1)
    with pytest.raises(UnavailableError, match=r"tried \d+ times"):
        retried(server.ask, 999, 0.5)
    assert 2 <= len(server.asked) <= 5
    assert server.lefts[-1] > 0
    assert server.lefts[-1] < 0.45


# ------------------------------------------------------------------ real servers


@pytest.fixture(scope="module")
def repository(fp32_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("retries") / "repository"
    return assemble(fp32_bundle, path, runner="onnxruntime:fp32", max_batch_size=16, max_queue=1)


def test_requests_to_a_full_server_are_retried(repository, figure):
    """Slow requests fill both decoding processes and their queue of length 1."""
    picture, slow = encoded((64, 48)), encoded((4000, 3000))
    data = np.array([[slow]] * 5, np.object_)  # more would count as a large request
    tensor = tritonclient.grpc.InferInput("image", data.shape, "BYTES")
    tensor.set_data_from_numpy(data)
    ended = threading.Semaphore(0)
    with ExitStack() as stack:
        server = stack.enter_context(
            TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0)
        )
        urls = [server.grpc_url, server.http_url]
        impatient = [stack.enter_context(ClipClient(url, attempts=1)) for url in urls]
        patient = [stack.enter_context(ClipClient(url, attempts=99)) for url in urls]
        raw = stack.enter_context(
            tritonclient.grpc.InferenceServerClient(server.grpc_url.partition("://")[2])
        )
        for _ in range(32):
            raw.async_infer("clip_image", [tensor], lambda result, error: ended.release())
        for _ in range(20):  # the rejected requests
            assert ended.acquire(timeout=30)
        begin = time.monotonic()
        for client in impatient:
            with pytest.raises(OverloadedError, match=r"is full and rejected .*maximum queue size"):
                client.embed_images([picture])
        refused = time.monotonic() - begin
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda client: client.embed_images([picture]), patient))
        answered = time.monotonic() - begin
        assert [answer.shape for answer in answers] == [(1, 32)] * 2
        assert refused < answered
    figure(
        "a full server",
        f"refuses in {refused * 500:.0f} ms; the client that asks again has its answer after "
        f"{answered:.1f} s, when there is room",
    )


def test_client_waits_for_a_late_or_restarted_server(repository):
    ports = choose_ports(0, 0, 0)
    where = {"http_port": ports.http, "grpc_port": ports.grpc, "metrics_port": ports.metrics}
    urls = [f"grpc://127.0.0.1:{ports.grpc}", f"http://127.0.0.1:{ports.http}"]
    for url in urls:
        with pytest.raises(UnavailableError, match=r"no Triton server answers .*tried 2 times"):
            ClipClient(url, attempts=2)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        early = [pool.submit(ClipClient, url, attempts=99) for url in urls]
        with TritonServer(repository, **where):
            for future in early:
                stack.enter_context(future.result())
            clients = [stack.enter_context(ClipClient(url)) for url in urls]
            for client in clients:
                client.embed_texts(["a cat"])
        for client, url in zip(clients, urls, strict=True):
            with pytest.raises(UnavailableError, match=rf"{url}.*refused.* \(tried 4 times"):
                client.embed_texts(["a cat"])
        with TritonServer(repository, **where):
            time.sleep(0.3)  # gRPC tries to reconnect every 0.1 s
            for client in clients:
                assert client.embed_texts(["a cat"]).shape == (1, 32)


def test_zero_attempts_are_rejected():
    with pytest.raises(InputError, match="attempts: expected a number from 1"):
        ClipClient("grpc://127.0.0.1:1", attempts=0)
