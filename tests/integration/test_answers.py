"""Answers of servers that start, stop, are killed under load, or answer with something else."""

import os
import threading
import time
from contextlib import ExitStack

import pytest
import tritonclient.grpc

import serving.triton.server
from serving.clients.triton import ClipClient
from serving.errors import ServerError, UnavailableError
from serving.triton.network import choose_ports
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.servers import encoded, processes

ANY = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
PROTOCOLS = ("grpc", "http")
KEY = "an-administrative-key"

FACTS = {
    "logit_scale": "10",
    "templates": '["{}"]',
    "model": "fake",
    "weights_sha256": "0" * 64,
    "embed_dim": "4",
    "image": '{"size": 8, "resize": 8, "interpolation": "bicubic", "mean": [0, 0, 0], '
    '"std": [1, 1, 1], "pipeline": "openai"}',
}
IMAGE_CONFIG = """
backend: "python" max_batch_size: 8
input [{ name: "image" data_type: TYPE_STRING dims: [1] }]
output [{ name: "image_embeds" data_type: TYPE_%s dims: [4] }]
"""
TEXT_CONFIG = """
backend: "python" max_batch_size: 8
input [{ name: "text" data_type: TYPE_STRING dims: [1] }]
output [{ name: "text_embeds" data_type: TYPE_FP32 dims: [4] }]
"""
ZERO_SHOT_CONFIG = """
backend: "python" max_batch_size: 0
input [{ name: "IMAGE" data_type: TYPE_STRING dims: [-1] },
       { name: "LABELS" data_type: TYPE_STRING dims: [-1] }]
output [{ name: "PROBABILITIES" data_type: TYPE_FP32 dims: [-1, -1] }]
"""
MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        time.sleep({load_s})

    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        n = pb.get_input_tensor_by_name(request, "{source}").as_numpy().shape[0]
        return pb.InferenceResponse([pb.Tensor("{target}", {value})])
"""


def add_model(root, name, config, source, target, value, load_s=0):
    (root / name / "1").mkdir(parents=True)
    code = MODEL.format(source=source, target=target, value=value, load_s=load_s)
    (root / name / "1" / "model.py").write_text(code)
    facts = ""
    if name == "clip_image":
        escaped = {key: value.replace('"', '\\"') for key, value in FACTS.items()}
        facts = "".join(
            f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}\n'
            for key, value in escaped.items()
        )
    (root / name / "config.pbtxt").write_text(config + facts)


# ------------------------------------------------------------------ wrong answers

WRONG = {
    "one dimension": ("FP32", "np.zeros(4, np.float32)", "[4]"),
    "too few rows": ("FP32", "np.zeros((n - 1, 4), np.float32)", "[1, 4]"),
    "too wide": ("FP32", "np.zeros((n, 5), np.float32)", "[2, 5]"),
    "type": ("FP64", "np.zeros((n, 4))", "float64"),
    "NaN": ("FP32", "np.full((n, 4), np.nan, np.float32)", "NaN"),
    "infinity": ("FP32", "np.full((n, 4), np.inf, np.float32)", "NaN or infinity"),
}


@pytest.fixture(scope="module")
def liars(tmp_path_factory):
    """A server for each wrong answer of `clip_image`; started when it is asked for."""
    with ExitStack() as stack:
        started = {}

        def start(kind):
            if kind not in started:
                root = tmp_path_factory.mktemp("liar")
                data_type, value, _ = WRONG[kind]
                config = IMAGE_CONFIG % data_type
                add_model(root, "clip_image", config, "image", "image_embeds", value)
                add_model(root, "clip_text", TEXT_CONFIG, "text", "text_embeds", VALUE)
                scores = "np.full((n, 3), 0.3, np.float32)"
                add_model(
                    root, "clip_zero_shot", ZERO_SHOT_CONFIG, "IMAGE", "PROBABILITIES", scores
                )
                started[kind] = stack.enter_context(TritonServer(root, **ANY))
            return started[kind]

        yield start


VALUE = "np.full((n, 4), 0.5, np.float32)"


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_answer_is_an_error_that_says_what_arrived(kind, liars):
    server, got = liars(kind), WRONG[kind][2]
    for url in (server.grpc_url, server.http_url):
        with ClipClient(url) as client:
            with pytest.raises(ServerError) as caught:
                client.embed_images([encoded(0)] * 2)
            assert not isinstance(caught.value, UnavailableError)
            assert got.lower() in caught.value.reason.lower()
            assert "[2, 4]" in caught.value.reason
            assert client.embed_texts(["a", "b"]).shape == (2, 4)
            with pytest.raises(ServerError) as caught:
                client.classify([encoded(0)], ["a", "b"])
            assert "[1, 2]" in caught.value.reason
            assert "[1, 3]" in caught.value.reason


# ------------------------------------------------------------------ models that load and unload


@pytest.fixture
def loading(tmp_path, monkeypatch):
    """A server whose models are loaded on request; `clip_text` takes 2 s."""
    add_model(tmp_path, "clip_image", IMAGE_CONFIG % "FP32", "image", "image_embeds", VALUE)
    add_model(tmp_path, "clip_text", TEXT_CONFIG, "text", "text_embeds", VALUE, load_s=2)
    flags = serving.triton.server.server_flags
    monkeypatch.setattr(
        serving.triton.server,
        "server_flags",
        lambda *args, **options: [*flags(*args, **options), "--model-control-mode=explicit"],
    )
    with TritonServer(tmp_path, admin_key=KEY, **ANY) as server:
        yield server


def test_request_waits_for_a_model_that_is_loading(loading):
    headers = {"triton-grpc-protocol-admin-key": KEY}
    address = loading.grpc_url.removeprefix("grpc://")
    with tritonclient.grpc.InferenceServerClient(address) as admin, ExitStack() as stack:
        admin.load_model("clip_image", headers=headers)
        urls = (loading.grpc_url, loading.http_url)
        patient = [stack.enter_context(ClipClient(url, attempts=99)) for url in urls]
        once = [stack.enter_context(ClipClient(url, attempts=1)) for url in urls]
        for client in (*patient, *once):
            with pytest.raises(ServerError) as caught:  # ready, without this model
                client.embed_texts(["a"])
            assert type(caught.value) is ServerError
            assert "clip-deploy assemble" in caught.value.advice
        for _ in range(2):
            loader = threading.Thread(
                target=admin.load_model, args=("clip_text",), kwargs={"headers": headers}
            )
            loader.start()
            time.sleep(0.5)
            for client in once:
                with pytest.raises(UnavailableError):
                    client.embed_texts(["a"])
            for client in patient:
                assert client.embed_texts(["a"]).shape == (1, 4)
            loader.join()
            admin.unload_model("clip_text", headers=headers)
            time.sleep(0.2)


# ------------------------------------------------------------------ servers killed under load


def kill_server(server):
    os.kill(server.pid, 9)


def kill_models(server):
    for process in processes(server):
        os.kill(process, 9)


@pytest.mark.parametrize("kill", [kill_server, kill_models, TritonServer.stop])
def test_requests_survive_a_restart_under_load(kill, fp32_bundle, tmp_path):
    """Requests that begin before, during and after the restart are all answered."""
    repository = tmp_path / "repository"
    assemble(fp32_bundle, repository, runner="onnxruntime:fp32", max_batch_size=16)
    ports = choose_ports(0, 0, 0)
    where = {"http_port": ports.http, "grpc_port": ports.grpc, "metrics_port": ports.metrics}
    errors, answers, stop = [], [], threading.Event()

    def load(client, ask):
        while not stop.is_set():
            try:
                answers.append((time.monotonic(), ask(client).shape))
            except Exception as error:
                errors.append(repr(error))
            time.sleep(0.01)

    asks = (
        lambda client: client.embed_texts(["a cat"]),
        lambda client: client.embed_images([encoded(0)]),
        lambda client: client.classify([encoded(0)], ["a", "b"]),
    )
    with ExitStack() as stack:
        first = stack.enter_context(TritonServer(repository, **where))
        urls = (first.grpc_url, first.http_url)
        clients = [stack.enter_context(ClipClient(url, attempts=999)) for url in urls]
        threads = [threading.Thread(target=load, args=(c, ask)) for c in clients for ask in asks]
        for thread in threads:
            thread.start()
        time.sleep(1)
        kill(first)
        time.sleep(0.5)
        if kill is kill_models:
            first.stop()
        with TritonServer(repository, **where):
            restarted = time.monotonic()
            time.sleep(2.5)
            stop.set()
            for thread in threads:
                thread.join(30)
        assert errors == []
        assert {shape for moment, shape in answers if moment > restarted} == {(1, 32), (1, 2)}
