"""Tests with killed model processes, killed servers and servers that are told to stop.

Triton 2.51 does not restart a killed model process; `python -m serving up --restart` restarts the
server.
"""

import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from serving.bundles.integrity import unsealed
from serving.cli import up as up_command
from serving.cli.up import Restarts, keep_up
from serving.clients.triton import ClipClient
from serving.errors import ServerError
from serving.triton import server as server_module
from serving.triton.network import Ports
from serving.triton.processes import stubs_of
from serving.triton.repository import assemble
from serving.triton.server import EXIT_TIMEOUT_S, TritonServer
from tests.support.paths import CHECKOUT

if importlib.util.find_spec("pytriton") is None:
    pytest.skip("no nvidia-pytriton: pip install 'clip-deploy[embedded]'", allow_module_level=True)

SOAK = bool(os.environ.get("CLIP_SOAK"))
SIGTERM_ROUNDS = 10 if SOAK else 1
DEADLINE_S = 20.0
FAILURES = (InferenceServerException, OSError, HTTPException)  # raised by tritonclient
RECOVERY_S = 90.0
"""Long, because other tests may use the CPUs at the same time."""
ANY = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
PYTHON_MODELS = (
    *("image_preprocess", "image_preprocess_large", "image_tower"),
    *("text_tokenize", "text_tower", "clip_zero_shot"),
)


@pytest.fixture(scope="module")
def repository(fp32_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "repository"
    return assemble(fp32_bundle, path, runner="onnxruntime:fp32", max_batch_size=16)


def encoded(seed, size=(64, 48)):
    rng = np.random.default_rng(seed)
    grid = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    buffer = io.BytesIO()
    grid.resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


SMALL, LARGE = encoded(0), encoded(1, (1500, 1500))


def tensors(protocol, model, number, picture=SMALL, many=1):
    """Inputs of a request that is in no cache."""

    def strings(name, data, *rest):
        tensor = protocol.InferInput(name, [len(data), *rest], "BYTES")
        tensor.set_data_from_numpy(np.array(data, object).reshape(len(data), *rest))
        return tensor

    def array(name, data, kind):
        tensor = protocol.InferInput(name, data.shape, kind)
        tensor.set_data_from_numpy(data)
        return tensor

    if model in ("clip_image", "image_preprocess", "image_preprocess_large"):
        return [strings("image", [picture] * many, 1)]
    if model in ("clip_text", "text_tokenize"):
        return [strings("text", [f"text {number} {i}".encode() for i in range(many)], 1)]
    if model == "image_tower":
        return [array("pixels", np.zeros((many, 3, 32, 32), np.uint8), "UINT8")]
    if model == "text_tower":
        return [array("input_ids", np.full((many, 16), 49407, np.int32), "INT32")]
    labels = [f"label {number} {i}".encode() for i in range(many * 8)]
    return [strings("IMAGE", [picture] * many), strings("LABELS", labels)]


@contextmanager
def opened(url, deadline=DEADLINE_S):
    """Open a client. Yields `ask(model, number, ...)`, which waits up to `deadline` seconds."""
    scheme, _, address = url.partition("://")
    if scheme == "grpc":
        protocol, options, limit = tritonclient.grpc, {}, {"client_timeout": deadline}
    else:
        protocol, limit = tritonclient.http, {}
        options = {"network_timeout": deadline, "connection_timeout": deadline}
    with protocol.InferenceServerClient(address, **options) as client:
        yield lambda model, number, **more: client.infer(
            model, tensors(protocol, model, number, **more), **limit
        )


def kill_stubs(server_pid, model):
    victims = [stub.pid for stub in stubs_of(server_pid) if stub.model == model]
    assert victims, f"{model} has no process"
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------ killed model processes


def test_killed_model_process_is_detected_and_its_requests_fail(repository, figure):
    slowest = 0.0
    with TritonServer(repository, **ANY) as server, opened(server.grpc_url) as ask:
        assert {stub.model for stub in stubs_of(server.pid)} == set(PYTHON_MODELS)
        assert server.fault() is None
        for number, model in enumerate(PYTHON_MODELS):
            if model != "clip_zero_shot":  # it needs the other models
                ask(model, number)
            kill_stubs(server.pid, model)
            start = time.monotonic()
            with pytest.raises(InferenceServerException, match="is not healthy"):
                ask(model, 100 + number)
            slowest = max(slowest, time.monotonic() - start)
            assert model in server.fault()
        with opened(server.http_url) as over_http:
            for model in ("clip_image", "clip_text", "clip_zero_shot"):
                with pytest.raises(InferenceServerException, match="is not healthy"):
                    over_http(model, 200)
        server.stop(0)
    assert slowest < DEADLINE_S
    figure(
        "killed model process",
        f"each of {len(PYTHON_MODELS)}: noticed at once; the next request fails within "
        f"{slowest:.1f} s, none hangs",
    )


@pytest.mark.parametrize("model", ["clip_zero_shot", "image_tower"] if SOAK else ["clip_zero_shot"])
def test_requests_in_flight_in_a_killed_process_end(repository, model, figure):
    """Triton forgets requests whose response sender died; only a deadline ends them."""
    deadline = 6.0
    with TritonServer(repository, **ANY) as server:
        ends, begun = [], threading.Semaphore(0)

        def worker(number):
            with opened(server.grpc_url if number % 2 else server.http_url, deadline) as ask:
                begun.release()
                for turn in range(1000):
                    start = time.monotonic()
                    try:
                        asked = "clip_zero_shot" if model == "clip_zero_shot" else "clip_image"
                        ask(asked, 1000 * number + turn, picture=LARGE, many=4)
                    except FAILURES as error:
                        ends.append((time.monotonic() - start, str(error)))
                        return

        threads = [threading.Thread(target=worker, args=(n,), daemon=True) for n in range(6)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=DEADLINE_S)
        time.sleep(0.5)
        kill_stubs(server.pid, model)
        for thread in threads:
            thread.join(3 * DEADLINE_S)
        assert not any(thread.is_alive() for thread in threads)
        assert len(ends) == len(threads)
        server.stop(0)
    slowest = max(seconds for seconds, _ in ends)
    assert slowest < deadline + 10, ends  # slack for a busy machine
    figure(
        f"requests under way in a killed {model}",
        f"{len(ends)} of {len(ends)} ended with an error, the last after {slowest:.1f} s of its "
        f"deadline of {deadline:g} s",
    )


# ------------------------------------------------------------------ the command


@dataclass
class Up:
    """Running `python -m serving up` process."""

    process: subprocess.Popen
    urls: dict
    repository: Path
    errors: Path

    @property
    def triton(self):
        """Process id of tritonserver."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                program, *arguments = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if not program.endswith(b"/tritonserver"):
                continue
            flags = dict(argument.partition(b"=")[::2] for argument in arguments)
            served = Path(os.fsdecode(flags[b"--model-repository"]))  # a link to the repository
            if served.resolve() == self.repository.resolve():
                return int(path.parent.name)
        raise AssertionError("tritonserver does not run")


@contextmanager
def up(repository, tmp_path, *options):
    """Run the command on a copy of the repository, whose path identifies its processes."""
    mine, errors = tmp_path / "repository", tmp_path / "stderr"
    if not mine.exists():
        shutil.copytree(repository, mine)
    command = [sys.executable, "-m", "serving", "up", str(mine), "--json", *options]
    ports = [part for name in ("http", "grpc", "metrics") for part in (f"--{name}-port", "0")]
    with (
        errors.open("a") as stderr,
        subprocess.Popen(
            [*command, *ports, "--log", str(tmp_path / "log")],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            line = process.stdout.readline()
            assert line, errors.read_text()
            yield Up(process, json.loads(line), mine, errors)
        finally:
            process.kill()


def seconds_until(action):
    """Repeat `action` until it succeeds. Return the time that took, in seconds."""
    start = time.monotonic()
    while True:
        try:
            action()
        except (ServerError, *FAILURES):
            assert time.monotonic() - start < RECOVERY_S
            time.sleep(0.1)
        else:
            return time.monotonic() - start


def embeds(url):
    with ClipClient(url, timeout=DEADLINE_S) as client:
        assert client.embed_images([SMALL]).shape == (1, 32)
        assert client.embed_texts([f"text {time.monotonic()}"]).shape == (1, 32)
        assert client.classify([SMALL], ["a", f"{time.monotonic()}"]).shape == (1, 2)


def test_up_restart_recovers_from_killed_processes(repository, tmp_path, figure):
    with up(repository, tmp_path, "--restart") as running:
        embeds(running.urls["grpc"])
        first = running.triton
        kill_stubs(first, "text_tower")
        time.sleep(1)  # the fault is detected; requests fail meanwhile
        model_s = 1 + seconds_until(lambda: embeds(running.urls["http"]))
        second = running.triton
        assert second != first
        os.kill(second, signal.SIGKILL)
        time.sleep(1)
        server_s = 1 + seconds_until(lambda: embeds(running.urls["grpc"]))
        assert running.triton not in (first, second)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
    told = running.errors.read_text()
    assert re.search(r"a process of text_tower died; .*Restarting in 1 s \(restart 1 within", told)
    assert re.search(
        r"Triton ended unexpectedly \(status 137\); .*Restarting in 2 s \(restart 2 within", told
    )
    assert "Triton is running again" in told
    assert "stopping; requests in flight have up to 25 s" in told
    figure(
        "recovery",
        f"killed model process: served again on the same ports after {model_s:.0f} s; killed "
        f"server: after {server_s:.0f} s",
    )


def test_up_without_restart_exits_with_a_reason(repository, tmp_path, figure):
    with up(repository, tmp_path) as running, ClipClient(running.urls["grpc"], timeout=5) as client:
        client.embed_images([SMALL])
        os.kill(running.triton, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(ServerError):
            client.embed_images([SMALL])
        seconds = time.monotonic() - start
        assert seconds < 5 + 10  # its deadline, plus slack for a busy machine
        assert running.process.wait(30) == 2
    told = running.errors.read_text()
    assert "error: Triton ended unexpectedly (status 137)" in told
    assert "start the server again, or give --restart" in told
    assert "Traceback" not in told
    figure("killed server", f"the client's call fails after {seconds:.1f} s of its deadline of 5 s")


def test_up_can_be_stopped_while_it_starts(tmp_path):
    """SIGTERM arrives before the server is ready."""
    slow = tmp_path / "slow" / "slow" / "1"
    slow.mkdir(parents=True)
    (slow.parent / "config.pbtxt").write_text(CONFIG)
    (slow / "model.py").write_text(
        "import time\n\nclass TritonPythonModel:\n    def initialize(self, args):\n"
        "        print('starting', flush=True)\n        time.sleep(60)\n"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-m", "serving", "up", str(slow.parents[1]), "--log", str(log)]
    ports = [part for name in ("http", "grpc", "metrics") for part in (f"--{name}-port", "0")]
    with subprocess.Popen([*command, *ports], cwd=CHECKOUT, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + DEADLINE_S
        while not (log.exists() and "starting" in log.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"stopped" in told
    assert b"Traceback" not in told


CONFIG = """
backend: "python"
max_batch_size: 8
input [{ name: "X" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "Y" data_type: TYPE_FP32 dims: [1] }]
"""
MURDEROUS = """
import os, signal, threading, time

class TritonPythonModel:
    def initialize(self, args):
        def kill():
            time.sleep(1.5)
            os.kill(os.getppid(), signal.SIGKILL)
        threading.Thread(target=kill, daemon=True).start()
"""


def test_up_gives_up_after_repeated_crashes(tmp_path, monkeypatch, capsys):
    model = tmp_path / "repository" / "murderous" / "1"
    model.mkdir(parents=True)
    (model.parent / "config.pbtxt").write_text(CONFIG)
    (model / "model.py").write_text(MURDEROUS)
    monkeypatch.setattr(up_command, "MAX_EARLY_ENDS", 2)
    monkeypatch.setattr(up_command, "FIRST_PAUSE_S", 0.1)
    started = []

    def server(ports):
        return TritonServer(
            tmp_path / "repository",
            http_port=ports.http,
            grpc_port=ports.grpc,
            metrics_port=ports.metrics,
            log=tmp_path / "log",
        )

    with pytest.raises(
        ServerError, match="has ended 3 times in a row within 60 s of its start; read"
    ):
        keep_up(server, Ports(0, 0, 0), started.append, restart=True)
    assert len(started) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "Restarting in 0.1 s (restart 1 within 10 minutes)" in told
    assert "Restarting in 0.2 s (restart 2 within 10 minutes)" in told


def test_restart_pauses_grow_until_the_server_ends_early_too_often():
    restarts = Restarts()
    ran = [-math.inf, 0, 1, 30, 59, 5]
    pauses = [restarts.pause(10 * index, seconds) for index, seconds in enumerate(ran)]
    assert pauses == [1, 2, 4, 8, 16, None]


def test_server_that_runs_for_a_minute_is_always_restarted():
    """Requests that end the server, one a minute, do not end the service."""
    restarts = Restarts()
    pauses = [restarts.pause(61 * index, 60) for index in range(20)]
    assert pauses[:6] == [1, 2, 4, 8, 16, 30]
    assert set(pauses[6:]) == {30}
    assert restarts.early == 0
    assert [restarts.pause(1300, 5) for _ in range(4)] == [30] * 4
    assert restarts.pause(1360, 60) == 30  # ends in a row start at 0 again
    assert [restarts.pause(1400, 5) for _ in range(6)] == [30] * 5 + [None]
    assert restarts.pause(5000, 60) == 1


def test_hanging_server_is_detected(repository, monkeypatch):
    monkeypatch.setattr(server_module, "SILENCE_S", 1.0)
    with TritonServer(repository, **ANY) as server:
        os.kill(server.pid, signal.SIGSTOP)
        start = time.monotonic()
        while (fault := server.fault()) is None and time.monotonic() - start < DEADLINE_S:
            time.sleep(0.1)
        assert "Triton has not answered for 1 s" in fault
        server.stop(0)
        assert "ended unexpectedly" in server.fault()


# ------------------------------------------------------------------ stopping


def under_load(running, keep_sending):
    """Send requests over both protocols and stop the command.

    Return the accepted requests, those of them that failed, and the seconds until exit.
    """
    told = threading.Event()
    ends, ready = [], threading.Semaphore(0)

    def worker(number, url, model):
        with opened(url) as ask:
            for turn in range(10_000):
                start, error = time.monotonic(), None
                try:
                    ask(model, 10_000 * number + turn, picture=LARGE, many=4)
                except FAILURES as failure:
                    error = str(failure)
                ends.append((start, time.monotonic(), model, error))
                if turn == 0:
                    ready.release()
                if error is not None or (told.is_set() and not keep_sending):
                    return

    models = ("clip_image", "clip_image", "clip_text", "clip_zero_shot", "text_tower")
    urls = [running.urls[scheme] for scheme in ("grpc", "http") for _ in models]
    threads = [
        threading.Thread(target=worker, args=(number, url, model), daemon=True)
        for number, (url, model) in enumerate(zip(urls, models * 2, strict=True))
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert ready.acquire(timeout=60)
    time.sleep(1)
    at = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    told.set()
    status = running.process.wait(60)
    seconds = time.monotonic() - at
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert status == 0, running.errors.read_text()
    # Requests sent at least 0.1 s before the signal have surely reached the server.
    accepted = [end for end in ends if end[0] < at - 0.1 and end[1] > at]
    return accepted, [end for end in accepted if end[3] is not None], seconds


@pytest.mark.parametrize("keep_sending", [False, True] if SOAK else [False])
def test_sigterm_under_load_loses_no_accepted_request(repository, tmp_path, figure, keep_sending):
    accepted, lost, longest = 0, [], 0.0
    for _ in range(SIGTERM_ROUNDS):
        with up(repository, tmp_path) as running:
            found, failed, seconds = under_load(running, keep_sending)
        accepted, lost, longest = accepted + len(found), lost + failed, max(longest, seconds)
    assert not lost, lost
    assert accepted > 0
    assert longest < 30
    figure(
        "SIGTERM under load" + (", clients go on sending" if keep_sending else ""),
        f"0 of {accepted} accepted requests lost, over HTTP and gRPC; exit after {longest:.1f} s",
    )


def test_idle_connection_does_not_delay_the_stop(repository):
    with TritonServer(repository, **ANY) as server, opened(server.http_url) as ask:
        ask("clip_image", 0)
        start = time.monotonic()
        server.stop()
        seconds = time.monotonic() - start
    assert seconds < EXIT_TIMEOUT_S / 2


# ------------------------------------------------------------------ changes after assembly


def flip(file):
    """Replace a link to a bundle's file by a copy with one byte changed in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    file.write_bytes(data)


def edit(file):
    document = json.loads(file.read_text())
    document["image"]["resize"] += 1
    file.unlink()
    file.write_text(json.dumps(unsealed(document) | {"checksum": document["checksum"]}))


@pytest.mark.parametrize(
    ("model", "name", "change", "reason"),
    [
        ("image_tower", "image.fp32.onnx", flip, "is not the file that was exported"),
        ("text_tower", "text.fp32.onnx", flip, "is not the file that was exported"),
        ("text_tokenize", "tokenizer.json", flip, "is not the file that was exported"),
        ("image_preprocess", "manifest.json", edit, "it was edited or damaged"),
    ],
)
def test_repository_changed_after_assembly_is_not_served(
    repository, tmp_path, model, name, change, reason
):
    mine = Path(shutil.copytree(repository, tmp_path / "repository"))
    file = mine / model / "1" / "bundle" / name
    change(file)
    with (
        pytest.raises(ServerError, match=rf"{re.escape(str(file))}[\s\S]*{reason}"),
        TritonServer(mine, **ANY),
    ):
        pass
