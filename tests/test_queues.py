"""What is too much for a queue, as a server's metrics tell; with real servers: test_overload.py."""

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from serving import queues
from serving.queues import LOOK_S, RARELY_S, Ahead, Behind


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(queues, "time", clock)
    return clock


class Server:
    """Tells how many wait, and counts how often it was asked."""

    def __init__(self):
        self.waiting, self.looks = 0, 0

    def look(self, model):
        assert model == "tower"
        self.looks += 1
        return self.waiting


def test_while_little_comes_nobody_looks(clock):
    server = Server()
    ahead = Ahead("tower", 8, look=server.look)
    assert [ahead.room(1) for _ in range(8)] == [1] * 8
    assert server.looks == 0


def test_what_passed_counts_until_a_look_shows_that_it_is_done(clock):
    server = Server()
    ahead = Ahead("tower", 8, look=server.look)
    assert ahead.room(6) == 6
    server.waiting = 5  # one of them is done
    assert ahead.room(4) == 3
    assert server.looks == 1
    server.waiting = 0
    assert ahead.room(4) == 0  # too soon to look again
    clock.now += 1.1 * LOOK_S
    assert ahead.room(4) == 4
    assert server.looks == 2


def test_what_others_sent_counts_too(clock):
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


def test_a_model_that_is_idle_does_not_look(clock):
    server = Server()
    server.waiting = 99
    behind = Behind("tower", 8, look=server.look)
    for _ in range(20):
        assert behind.excess(3) == 0
        behind.done()
        clock.now += 0.2
    assert server.looks == 0


def test_a_short_queue_is_looked_at_rarely(clock):
    server = Server()
    behind = Behind("tower", 8, look=server.look)
    for _ in range(100):
        behind.excess(1)
        clock.now += 0.9 * LOOK_S
        behind.done()
    assert server.looks == pytest.approx(100 * 0.9 * LOOK_S / RARELY_S, rel=0.25)


def test_a_busy_model_refuses_what_is_too_much_and_no_more(clock):
    server = Server()
    behind = Behind("tower", 8, look=server.look)
    behind.excess(4)
    behind.done()
    server.waiting = 18
    assert behind.excess(4) == 4
    behind.done()
    server.waiting = 99  # seen at the next look
    assert [behind.excess(4), behind.excess(4), behind.excess(4)] == [4, 2, 0]
    behind.done()
    clock.now += 1.1 * LOOK_S
    behind.done()
    assert behind.excess(4) == 4
    assert server.looks == 2


METRICS = """# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="clip_text",version="1"} 9
nv_inference_pending_request_count{model="tower",version="1"} 3
nv_inference_pending_request_count{model="tower_2",version="1"} 5
nv_inference_request_success{model="tower",version="1"} 700
"""


@pytest.fixture
def metrics(monkeypatch):
    """Serve METRICS where a model looks for them."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = METRICS.encode() if self.path == "/metrics" else b""
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv(queues.METRICS, f"127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


def test_the_servers_metrics_tell(metrics):
    assert [queues.waiting(model) for model in ("tower", "tower_2", "clip_text")] == [3, 5, 9]


def test_without_metrics_no_bound_holds_and_the_log_says_so_once(monkeypatch):
    logged = []
    stub = SimpleNamespace(Logger=SimpleNamespace(log_warn=logged.append))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)  # Triton's stub has it
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv(queues.METRICS, address)
    assert [queues.waiting("tower") for _ in range(3)] == [0, 0, 0]
    assert len(logged) == 1
    assert f"no metrics of tower at {address}" in logged[0]
    assert queues.METRICS in logged[0]
