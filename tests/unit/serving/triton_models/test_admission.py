"""Admission control based on a server's metrics. Tests with real servers are in
test_overload.py."""

import socket
import sys
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from serving.triton_models import admission
from serving.triton_models.admission import LOOK_S, SHORT_S, Ahead, Behind, Metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(admission, "time", clock)
    return clock


class Server:
    """Reports the length of the queue, and counts the queries."""

    def __init__(self):
        self.waiting, self.looks = 0, 0

    def look(self, model):
        assert model == "tower"
        self.looks += 1
        return self.waiting


def test_metrics_are_not_read_below_the_limit(clock):
    server = Server()
    ahead = Ahead("tower", 8, look=server.look)
    assert [ahead.room(1) for _ in range(8)] == [1] * 8
    assert server.looks == 0


def test_admitted_requests_count_until_metrics_show_them_done(clock):
    server = Server()
    ahead = Ahead("tower", 8, look=server.look)
    assert ahead.room(6) == 6
    server.waiting = 5  # one of them is done
    assert ahead.room(4) == 3
    assert server.looks == 1
    server.waiting = 8
    assert ahead.room(4) == 0
    server.waiting = 0
    assert ahead.room(4) == 0  # too early for the next look
    clock.now += 1.1 * LOOK_S
    assert ahead.room(4) == 4
    assert server.looks == 3


def test_requests_of_other_senders_count(clock):
    server = Server()
    server.waiting = 20
    ahead = Ahead("tower", 8, look=server.look)
    assert ahead.room(9) == 0
    server.waiting = 7
    clock.now += 1.1 * LOOK_S
    assert ahead.room(9) == 1


@pytest.mark.parametrize("limit", [1, 7, 8, 100])
@pytest.mark.parametrize("feeders", [2, 3])
def test_feeders_share_the_room(clock, limit, feeders):
    server = Server()
    every = [Ahead("tower", limit, feeders=feeders, look=server.look) for _ in range(feeders)]
    passed = [ahead.room(1000) for ahead in every]
    assert min(passed) >= 1
    assert limit <= sum(passed) < limit + feeders


def test_room_is_checked_again_while_the_queue_drains(clock):
    """The short queue of a tower that keeps up is never considered full."""
    server = Server()
    ahead = Ahead("tower", 1, look=server.look)
    for _ in range(20):
        assert ahead.room(1) == 1
        clock.now += LOOK_S / 4


def test_idle_model_reads_metrics_once_per_second(clock):
    server = Server()
    behind = Behind("tower", 8, look=server.look)
    for _ in range(50):
        assert behind.excess(3) == 0
        behind.done()
        clock.now += 0.2
    assert 8 <= server.looks <= 10


def test_short_queue_is_checked_rarely(clock):
    server = Server()
    behind = Behind("tower", 8, look=server.look)
    for _ in range(100):
        behind.excess(1)
        clock.now += 0.9 * LOOK_S
        behind.done()
    assert server.looks == pytest.approx(100 * 0.9 * LOOK_S / SHORT_S, rel=0.25)


def test_busy_model_rejects_only_the_excess(clock):
    server = Server()
    behind = Behind("tower", 8, look=server.look)
    behind.excess(4)
    behind.done()
    server.waiting = 17  # ten more than seven eighths of the limit
    assert behind.excess(4) == 4
    behind.done()
    server.waiting = 99  # seen at the next look
    assert [behind.excess(4), behind.excess(4), behind.excess(4)] == [4, 2, 0]
    clock.now += 1.1 * LOOK_S
    behind.done()
    assert behind.excess(4) == 4
    assert server.looks == 2


def test_excess_that_disappeared_is_not_rejected_later(clock):
    """Clients that give up leave the queue without being served."""
    server = Server()
    behind = Behind("tower", 8, look=server.look)
    behind.done()
    server.waiting = 98
    assert behind.excess(4) == 4
    behind.done()
    server.waiting = 0
    clock.now += 0.2
    assert behind.excess(4) == 0


def test_starved_model_reads_metrics_between_rare_batches(clock):
    server = Server()
    server.waiting = 50
    behind = Behind("tower", 8, look=server.look)
    clock.now += 1.5
    assert behind.excess(4) == 4


METRICS = """# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="clip_text",version="1"} 9
nv_inference_pending_request_count{model="tower",version="1"} 3
nv_inference_pending_request_count{model="tower_2",version="1"} 5
nv_inference_request_success{model="tower",version="1"} 700
"""


@pytest.fixture
def serve():
    """Serve a body with a status as metrics. Returns host:port."""
    with ExitStack() as stack:

        def serve(body, status=200):
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(status if self.path == "/metrics" else 404)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

                def log_message(self, *_):
                    pass

            server = stack.enter_context(HTTPServer(("127.0.0.1", 0), Handler))
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"127.0.0.1:{server.server_port}"

        yield serve


@pytest.fixture
def logged(monkeypatch):
    """Messages logged through the module that only Triton's stub provides."""
    lines = []
    stub = SimpleNamespace(Logger=SimpleNamespace(log_warn=lines.append))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
    return lines


def test_queue_length_is_read_from_metrics(serve, monkeypatch):
    monkeypatch.setenv(admission.METRICS, serve(METRICS.encode()))
    metrics = Metrics()
    assert [metrics.waiting(model) for model in ("tower", "tower_2", "clip_text")] == [3, 5, 9]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"\xff\xfe", 200, "no queue length of tower"),
        (METRICS.encode(), 503, "status 503"),
        (METRICS.replace("tower", "other").encode(), 200, "no queue length of tower"),
    ],
)
def test_invalid_metrics_are_logged_once(serve, logged, body, status, reason):
    metrics = Metrics(serve(body, status))
    assert [metrics.waiting("tower") for _ in range(3)] == [0, 0, 0]
    assert len(logged) == 1
    assert reason in logged[0]
    assert admission.METRICS in logged[0]


@pytest.mark.parametrize(
    "address", ["http://localhost:8002/metrics", "..:8002", "nowhere.invalid:1", "127.0.0.1:1"]
)
def test_invalid_address_is_logged(logged, address):
    assert Metrics(address).waiting("tower") == 0
    assert address in logged[0]


def test_unresponsive_metrics_are_awaited_once(logged):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        metrics = Metrics(f"127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        assert [metrics.waiting("tower") for _ in range(50)] == [0] * 50
        assert 0.4 < time.monotonic() - begin < 2
    assert "timed out" in logged[0]
