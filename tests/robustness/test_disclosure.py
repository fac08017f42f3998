"""Tests that responses disclose no paths, tracebacks or other internals of the server."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from serving.bundles.bundle import Bundle, describe_file
from serving.clients.triton import ClipClient
from serving.errors import ServerError
from serving.triton.server import TritonServer
from tests.support.paths import CHECKOUT
from tests.support.requests import ANY, PROTOCOLS, ask_http, raw, tiny_repository

if importlib.util.find_spec("pytriton") is None:
    pytest.skip("no nvidia-pytriton: pip install 'clip-deploy[embedded]'", allow_module_level=True)


@pytest.fixture(scope="module")
def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    return buffer.getvalue()


def strings(module, shape=(), **inputs):
    made = []
    for name, values in inputs.items():
        data = np.array(values, np.object_).reshape(len(values), *shape)
        made.append(module.InferInput(name, list(data.shape), "BYTES"))
        made[-1].set_data_from_numpy(data)
    return made


def test_shared_memory_names_are_not_disclosed(server, repository):
    regions = {path.name for path in Path("/dev/shm").glob("clip-deploy-*")}
    prefixes = {re.match("clip-deploy-[0-9a-f]{16}", name)[0] for name in regions}
    assert prefixes
    _, told = ask_http(server, "GET", "", {})
    name = json.loads(told)["name"]
    assert not any(name.startswith(prefix) or prefix in name for prefix in prefixes)
    models = [config.parent.name for config in repository.glob("*/config.pbtxt")]
    assert len(models) == 9
    for model in models:
        for path in (f"models/{model}", f"models/{model}/config"):
            status, body = ask_http(server, "GET", path, {})
            assert status == 200
            for secret in (str(repository), str(CHECKOUT), *prefixes):
                assert secret not in body.decode()


BREAK_PREPROCESS = '''

from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel(TritonPythonModel):
    """Broken by a test: it looks for a file that is not there any more."""

    def respond(self, request):
        data = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().ravel()[0]
        if data.startswith(b"II"):
            Path(__file__).with_name("gone.bin").read_bytes()
        return super().respond(request)
'''


BREAK_TOKENIZE = '''

import triton_python_backend_utils as pb_utils


class TritonPythonModel(TritonPythonModel):
    """Broken by a test."""

    def respond(self, request):
        raw = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().ravel()
        if raw[0] == b"break":
            raise RuntimeError(f"{pb_utils.__file__} in\\nclip-deploy-region")
        return super().respond(request)
'''


BREAK_ZERO_SHOT = '''

class TritonPythonModel(TritonPythonModel):
    """Broken by a test."""

    def label_set(self, request):
        labels = super().label_set(request)
        if labels.labels[0] == "break":
            raise OSError(28, "No space left on device", __file__)
        return labels
'''


TIFF = b"II*\0 of no use"


@pytest.fixture(scope="module")
def broken(repository, tmp_path_factory):
    """Server whose models fail on certain inputs. In the text tower, ONNX Runtime itself fails."""
    path = tmp_path_factory.mktemp("broken") / "repository"
    shutil.copytree(repository, path)
    for model, source in (
        ("image_preprocess", BREAK_PREPROCESS),
        ("text_tokenize", BREAK_TOKENIZE),
        ("clip_zero_shot", BREAK_ZERO_SHOT),
    ):
        with (path / model / "1" / "model.py").open("a") as file:
            file.write(source)
    break_text_tower(path / "text_tower" / "1" / "bundle")
    with TritonServer(path, **ANY, log=path.with_suffix(".log")) as running:
        yield running


def break_text_tower(bundle):
    """Replace the text tower with a graph that fails for ids which its manifest allows."""
    table = onnx.numpy_helper.from_array(np.ones((49408, 32), np.float32), "table")
    ids = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT32, ["n", "length"])
    out = onnx.helper.make_tensor_value_info("text_embeds", onnx.TensorProto.FLOAT, ["n", 32])
    nodes = [
        onnx.helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        onnx.helper.make_node("ReduceMean", ["tokens"], ["text_embeds"], axes=[1], keepdims=0),
    ]
    graph = onnx.helper.make_graph(nodes, "broken", [ids], [out], [table])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    file = bundle / "text.fp32.onnx"
    file.unlink()  # a hard link to the file of the bundle
    file.write_bytes(model.SerializeToString())
    known = Bundle.open(bundle).manifest
    artifacts = tuple(
        replace(artifact, files=(describe_file(file, bundle),))
        if (artifact.graph, artifact.precision) == ("text", "fp32")
        else artifact
        for artifact in known.artifacts
    )
    text = replace(known.text, vocab_size=1_000_000)
    changed = replace(known, text=text, artifacts=artifacts)
    (bundle / "manifest.json").write_text(changed.to_json())


FAILURES = {
    "image_preprocess": ("image_preprocess", {"image": [TIFF]}, (1,), "gone.bin"),
    "its ensemble": ("clip_image", {"image": [TIFF]}, (1,), "gone.bin"),
    "text_tokenize": ("text_tokenize", {"text": [b"break"]}, (1,), "clip-deploy-region"),
    "the text ensemble": ("clip_text", {"text": [b"break"]}, (1,), "clip-deploy-region"),
    "clip_zero_shot": ("clip_zero_shot", {"LABELS": [b"break", b"a"]}, (), "No space left"),
    "what it calls": ("clip_zero_shot", {"IMAGE": [TIFF], "LABELS": [b"a"]}, (), "gone.bin"),
}


def logged(server, message):
    """Check an error message and return the log line with its error id."""
    found = re.search(r"internal error ([0-9a-f]{8}); the server's log has it$", message, re.M)
    assert found, message
    assert "/" not in message
    assert "clip-deploy" not in message
    assert "Traceback" not in message
    deadline, lines = time.monotonic() + 30, []
    while not lines and time.monotonic() < deadline:  # written by another thread
        text = server.log.read_text().rpartition("\n")[0]  # complete lines only
        lines = [line for line in text.splitlines() if f"internal error {found[1]} in " in line]
        time.sleep(0.02)
    (line,) = lines
    assert "Traceback" in line
    return line


def internal_error(server, picture, where, protocol):
    model, inputs, shape, cause = FAILURES[where]
    if model == "clip_zero_shot":
        inputs = {"IMAGE": [picture], **inputs}
    module, client = raw(server, protocol)
    with client, pytest.raises(InferenceServerException) as failure:
        client.infer(model, strings(module, shape, **inputs))
    assert failure.value.status() in ("500", "StatusCode.INTERNAL")
    assert cause in logged(server, failure.value.message())
    return failure.value.message().partition("\n")[0]


def test_internal_error_discloses_only_an_id(broken, picture, figure):
    told = {
        internal_error(broken, picture, where, protocol)
        for where in FAILURES
        for protocol in PROTOCOLS
    }
    assert len(told) == 2 * len(FAILURES)  # error ids are unique
    figure("errors", f"{len(told)} of {len(told)} without inside, such as {sorted(told)[0]!r}")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_client_error_ends_with_the_error_id(broken, protocol):
    with (
        ClipClient(getattr(broken, f"{protocol}_url")) as client,
        pytest.raises(ServerError, match=r"internal error [0-9a-f]{8}; the server's log has it$"),
    ):
        client.embed_texts(["break"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_valid_requests_to_the_broken_server_are_answered(broken, picture, protocol):
    module, client = raw(broken, protocol)
    with client:
        client.infer("clip_image", strings(module, (1,), image=[picture]))
        client.infer("clip_text", strings(module, (1,), text=[b"a cat"]))
        client.infer("clip_zero_shot", strings(module, IMAGE=[picture], LABELS=[b"a", b"b"]))
        with pytest.raises(InferenceServerException, match="got 0 bytes") as refused:
            client.infer("clip_image", strings(module, (1,), image=[b""]))
        assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_request_rejected_by_the_runtime_fails_alone(broken, fp32_bundle, figure):
    """ONNX Runtime rejects the whole batch for one bad row, and its message has a source path."""
    spec = fp32_bundle.manifest.text
    rows = [np.full((1, 16), spec.end_id, np.int32) for _ in range(8)]
    rows[3][0, 0] = 999_999
    answers: list = [None] * len(rows)
    done = threading.Semaphore(0)
    module, client = raw(broken, "grpc")
    with client:

        def keep(index):
            def callback(result, error):
                answers[index] = error or result.as_numpy("text_embeds")
                done.release()

            return callback

        for index, row in enumerate(rows):
            tensor = module.InferInput("input_ids", row.shape, "INT32")
            tensor.set_data_from_numpy(row)
            client.async_infer("text_tower", [tensor], keep(index))
        for _ in rows:
            assert done.acquire(timeout=30)
    line = logged(broken, answers.pop(3).message())
    assert "999999" in line
    assert "/" in line
    assert [answer.shape for answer in answers] == [(1, 32)] * 7
    log = broken.log.read_text()
    figure("a bad row", f"1 of 8 requests at once failed, {log.count('in text_tower')} logged")


def test_killed_model_process_discloses_no_internals(tmp_path, figure):
    repository = tiny_repository(tmp_path / "dying")
    with TritonServer(repository, **ANY, log=tmp_path / "log") as running:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process has ended
                line = (process / "cmdline").read_bytes().decode(errors="replace")
                if line.split("\0")[0].endswith("_stub") and str(repository) in line:
                    os.kill(int(process.name), signal.SIGKILL)
        told = []
        for protocol in PROTOCOLS:
            module, client = raw(running, protocol)
            tensor = module.InferInput("I", [1], "FP32")
            tensor.set_data_from_numpy(np.zeros(1, np.float32))
            with client, pytest.raises(InferenceServerException) as failure:
                client.infer("idle", [tensor])
            told.append(failure.value.message())
    assert all("is not healthy" in message for message in told)
    assert not any("/" in message or "clip-deploy" in message for message in told)
    figure("errors", f"of a dead stub: {told[0]!r}")


MALFORMED = [
    ("POST", "models/clip_text/infer", b"{"),
    ("POST", "models/clip_text/infer", b'{"inputs": 3}'),
    (
        "POST",
        "models/clip_text/infer",
        b'{"inputs": [{"name": "text", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}',
    ),
    (
        "POST",
        "models/clip_text/infer",
        b'{"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES",'
        b' "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8}}]}',
    ),
    (
        "POST",
        "models/text_tokenize/infer",
        b'{"parameters": {"truncate": {"a": 1}}, "inputs": [{"name": "text", "shape": [1, 1],'
        b' "datatype": "BYTES", "data": ["a"]}]}',
    ),
    ("POST", "models/../../etc/passwd/infer", b"{}"),
    ("GET", "models/%2e%2e%2f%2e%2e%2fetc/config", None),
    ("POST", "models/no_such_model/infer", b"{}"),
    ("GET", "models/clip_text/versions/99/ready", None),
    ("GET", "nothing/here", None),
]


@pytest.mark.parametrize("case", range(len(MALFORMED)))
def test_malformed_requests_disclose_no_internals(server, repository, case):
    method, path, body = MALFORMED[case]
    request = urllib.request.Request(
        f"{server.http_url}/v2/{path}", method=method, headers={}, data=body
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    with refused.value as answer:
        told = answer.read().decode()
    assert 400 <= refused.value.code <= 501
    for secret in (str(repository), str(CHECKOUT), "/dev/shm", "clip-deploy-", "Traceback", ".py"):
        assert secret not in told
