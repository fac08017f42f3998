"""What an attacker meets: who may call what, what errors tell, what files do when they are read.

The servers here are real. Where one is to fail, its assembled repository is broken first.
"""

import ast
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from benchmarks.load.step_times import Statistics
from serving.bundles.bundle import Bundle
from serving.clients.endpoint import admin_headers
from serving.errors import InputError, ServerError
from serving.search.build import build as build_index
from serving.search.index import SearchIndex
from serving.tasks.zero_shot import ZeroShotClassifier
from serving.triton.network import ADMIN_APIS, HOST, Exposure, Ports, ServerTls
from serving.triton.repository import assemble
from serving.triton.server import TritonServer, server_flags
from tests.support.paths import CHECKOUT

if importlib.util.find_spec("pytriton") is None:
    pytest.skip("no nvidia-pytriton: pip install 'clip-deploy[embedded]'", allow_module_level=True)

ANY = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
PROTOCOLS = ("grpc", "http")
SECOND_LOOPBACK = "127.0.0.2"  # what listens on 127.0.0.1 alone is not found there


# ------------------------------------------------------------------ a server, whole


@pytest.fixture(scope="module")
def repository(fp32_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("security") / "repository"
    assemble(fp32_bundle, path, runner="onnxruntime:fp32", max_batch_size=8)
    return path


@pytest.fixture(scope="module")
def server(repository):
    with pytest.MonkeyPatch.context() as patch:
        # With it set, Triton by itself would open a port of Vertex AI on all addresses.
        patch.setenv("AIP_MODE", "PREDICTION")
        with TritonServer(repository, **ANY, log=repository.with_suffix(".log")) as running:
            yield running


@pytest.fixture(scope="module")
def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    return buffer.getvalue()


def listening(pid):
    """`address:port` of every TCP socket that a process listens on."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
            inodes |= {found[1]} if found else set()
    addresses = set()
    for kind in ("tcp", "tcp6"):  # gRPC listens on the IPv4 addresses of IPv6: ::ffff:127.0.0.1
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = struct.iter_unpack(">I", bytes.fromhex(address))
                number = ip_address(b"".join(struct.pack("<I", *word) for word in words))
                address = getattr(number, "ipv4_mapped", None) or number
                addresses.add(f"{address}:{int(port, 16)}")
    return sorted(addresses)


def raw(server, protocol):
    module = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
    address = getattr(server, f"{protocol}_url").partition("://")[2]
    return module, module.InferenceServerClient(address)


def strings(module, shape=(), **inputs):
    made = []
    for name, values in inputs.items():
        data = np.array(values, np.object_).reshape(len(values), *shape)
        made.append(module.InferInput(name, list(data.shape), "BYTES"))
        made[-1].set_data_from_numpy(data)
    return made


# ------------------------------------------------------------------ where it listens


def test_by_default_everything_is_on_loopback(server, figure):
    sockets = listening(server.pid)
    assert len(sockets) == 3
    assert {socket.partition(":")[0] for socket in sockets} == {HOST}
    assert server.exposed == []
    figure("loopback", f"3 of 3 listening sockets on {HOST}, also with AIP_MODE=PREDICTION")


def tiny_repository(root):
    """One model that answers nothing; it starts in a second."""
    (root / "idle" / "1").mkdir(parents=True)
    (root / "idle" / "config.pbtxt").write_text(
        'backend: "python"\ninput [{ name: "I" data_type: TYPE_FP32 dims: [1] }]\n'
        'output [{ name: "O" data_type: TYPE_FP32 dims: [1] }]\n'
    )
    (root / "idle" / "1" / "model.py").write_text(
        "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"
    )
    return root


def test_up_with_another_host_says_what_is_exposed(tmp_path):
    command = [sys.executable, "-m", "serving", "up", str(tiny_repository(tmp_path / "r"))]
    command += ["--host", "0.0.0.0", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    with subprocess.Popen(
        [*command, "--json", "--log", str(tmp_path / "log")],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as up:
        try:
            facts = json.loads(up.stdout.readline())
            http = facts["http"].rpartition(":")[2]
            for host in (HOST, SECOND_LOOPBACK):
                with urllib.request.urlopen(f"http://{host}:{http}/v2/health/ready") as answer:
                    assert answer.status == 200
            metrics = re.sub(r"//[\d.]+:", f"//{SECOND_LOOPBACK}:", facts["metrics"])
            with pytest.raises(urllib.error.URLError, match="refused"):
                urllib.request.urlopen(metrics)
        finally:
            up.send_signal(signal.SIGINT)
        _, told = up.communicate(timeout=30)
    grpc = facts["grpc"].rpartition(":")[2]
    for part in (
        f"http://0.0.0.0:{http} and grpc://0.0.0.0:{grpc}, unencrypted",
        "There is no authentication",
        "Behind a key: model-repository, shared-memory, statistics, trace, logging.",
        f"Metrics stay on {HOST}",
        "2.51, of 2024-10: every security bulletin since touches it",
        "SECURITY.md",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("localhost", r"expected an IPv4 address .* got 'localhost'"),
        ("::1", r"expected an IPv4 address"),
        ("192.0.2.1", r"192\.0\.2\.1 is no address of this machine"),  # RFC 5737: nobody's
    ],
)
def test_a_host_that_cannot_be(tmp_path, host, message):
    with pytest.raises(InputError, match=message):
        TritonServer(tmp_path, **ANY, host=host).__enter__()


def test_flags_by_release_and_exposure(tmp_path):
    def flags(version, **exposure):
        made = server_flags(
            version,
            repository=tmp_path,
            ports=Ports(1, 2, 3),
            cache_bytes=4,
            exit_timeout=5,
            key="k" * 16,
            exposure=Exposure(**exposure),
        )
        names = [flag.partition("=")[0] for flag in made]
        assert not [name for name, count in Counter(names).items() if count > 1]
        return dict(flag.partition("=")[::2] for flag in made)

    base = flags((2, 51))
    assert base["--http-address"] == base["--grpc-address"] == base["--metrics-address"] == HOST
    assert {base[f"--allow-{where}"] for where in ("sagemaker", "vertex-ai")} == {"false"}
    assert base["--model-control-mode"] == "none"
    restricted = f"{','.join(ADMIN_APIS)}:admin-key={'k' * 16}"
    assert base["--http-restricted-api"] == base["--grpc-restricted-protocol"] == restricted
    assert "--http-max-input-size" not in base
    newer = {"--http-max-input-size"}
    assert set(flags((2, 59))) == set(base) | newer
    assert set(flags((2, 68))) == set(flags((2, 75))) == set(base) | newer | {"--allow-client-shm"}
    open_ = flags((2, 75), host="0.0.0.0")
    assert open_["--http-address"] == open_["--grpc-address"] == "0.0.0.0"
    assert open_["--metrics-address"] == HOST
    tls = ServerTls(certificate=tmp_path / "c", key=tmp_path / "k", client_ca=tmp_path / "a")
    with_tls = flags((2, 75), host="0.0.0.0", tls=tls)
    assert with_tls["--http-address"] == with_tls["--metrics-address"] == HOST
    assert with_tls["--grpc-address"] == "0.0.0.0"
    assert with_tls["--grpc-use-ssl"] == with_tls["--grpc-use-ssl-mutual"] == "1"


# ------------------------------------------------------------------ who may call what

BY_HTTP = {
    "model-repository": [
        ("POST", "repository/index"),
        ("POST", "repository/models/clip_text/load"),
        ("POST", "repository/models/clip_text/unload"),
    ],
    "shared-memory": [
        *[("GET", f"{kind}sharedmemory/status") for kind in ("system", "cuda")],
        *[("GET", f"{kind}sharedmemory/region/r/status") for kind in ("system", "cuda")],
        *[("POST", f"{kind}sharedmemory/region/r/register") for kind in ("system", "cuda")],
        *[("POST", f"{kind}sharedmemory/region/r/unregister") for kind in ("system", "cuda")],
        *[("POST", f"{kind}sharedmemory/unregister") for kind in ("system", "cuda")],
    ],
    "statistics": [
        ("GET", "models/stats"),
        ("GET", "models/clip_text/stats"),
        ("GET", "models/clip_text/versions/1/stats"),
    ],
    "trace": [
        ("GET", "trace/setting"),
        ("POST", "trace/setting"),
        ("GET", "models/clip_text/trace/setting"),
        ("POST", "models/clip_text/trace/setting"),
    ],
    "logging": [("GET", "logging"), ("POST", "logging")],
}
BY_GRPC = {
    "model-repository": {
        "get_model_repository_index": (),
        "load_model": ("clip_text",),
        "unload_model": ("clip_text",),
    },
    "shared-memory": {
        "get_system_shared_memory_status": (),
        "register_system_shared_memory": ("r", "/r", 8),
        "unregister_system_shared_memory": ("r",),
        "get_cuda_shared_memory_status": (),
        "register_cuda_shared_memory": ("r", b"", 0, 8),
        "unregister_cuda_shared_memory": ("r",),
    },
    "statistics": {"get_inference_statistics": ()},
    "trace": {
        "get_trace_settings": (),
        "update_trace_settings": ("clip_text", {"trace_rate": "1"}),
    },
    "logging": {"get_log_settings": (), "update_log_settings": ({"log_verbose_level": 1},)},
}
WRONG = ("", "0" * 32)


def ask_http(server, method, path, headers):
    """Status and body."""
    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(
        f"{server.http_url}/v2/{path}".rstrip("/"), method=method, headers=headers, data=body
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_administration_needs_the_key_over_http(server, figure):
    assert set(BY_HTTP) == set(ADMIN_APIS)
    calls = [call for api in ADMIN_APIS for call in BY_HTTP[api]]
    for method, path in calls:
        for headers in ({}, *(admin_headers("http", key) for key in WRONG)):
            status, body = ask_http(server, method, path, headers)
            assert status == 403, (path, body)
            assert b"restricted" in body
        if method == "GET":
            status, body = ask_http(server, method, path, admin_headers("http", server.admin_key))
            assert b"restricted" not in body
            assert status == 200 or "region/r" in path
    figure("administration", f"{3 * len(calls)} of {3 * len(calls)} HTTP calls without key refused")


def test_administration_needs_the_key_over_grpc(server, figure):
    assert set(BY_GRPC) == set(ADMIN_APIS)
    calls = {call: given for api in ADMIN_APIS for call, given in BY_GRPC[api].items()}
    _, client = raw(server, "grpc")
    with client:
        for call, arguments in calls.items():
            for headers in (None, *(admin_headers("grpc", key) for key in WRONG)):
                with pytest.raises(InferenceServerException, match="protocol is restricted"):
                    getattr(client, call)(*arguments, headers=headers)
            if call.startswith("get_"):
                getattr(client, call)(headers=admin_headers("grpc", server.admin_key))
    figure("administration", f"{3 * len(calls)} of {3 * len(calls)} gRPC calls without key refused")


SPELLINGS = (
    "//v2/repository/index",
    "/v2//repository/index",
    "/v2/./repository/index",
    "/v2/repository/index/",
    "/v2/%72epository/index",
    "/v2/models/../repository/index",
    "/v2/repository/other/index",
    "/v2/repository/index?x=1",
    "/V2/repository/index",
    "/v2;x/repository/index",
)
"""Other ways to write one path; CVE-2026-24206 and -24207 are about such."""


def test_no_other_spelling_of_a_path_gets_around_the_key(server, figure):
    address = server.http_url.removeprefix("http://")
    for spelling in SPELLINGS:
        with closing(http.client.HTTPConnection(address, timeout=10)) as connection:
            connection.request("POST", spelling, body=b"{}")
            with connection.getresponse() as answer:
                assert answer.status in (403, 404), spelling
    figure("administration", f"{len(SPELLINGS)} other spellings of a path refused")


def test_a_key_is_of_one_server_and_not_in_its_log(server):
    assert re.fullmatch("[0-9a-f]{32}", server.admin_key)
    assert TritonServer(server.repository).admin_key != server.admin_key
    assert server.admin_key not in server.log.read_text()


@pytest.mark.parametrize("key", ["short", "a" * 15, "with a space and more", "a,b=c:" * 5])
def test_a_key_of_ones_own(tmp_path, key):
    with pytest.raises(InputError, match="at least 16 letters, digits"):
        TritonServer(tmp_path, admin_key=key)
    assert TritonServer(tmp_path, admin_key="my-own_key-of-16").admin_key == "my-own_key-of-16"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_statistics_say_that_they_want_the_key(server, protocol):
    url = getattr(server, f"{protocol}_url")
    for key in (None, *WRONG):
        with pytest.raises(ServerError, match=r"administrative key; give it as --admin-key"):
            Statistics(url, key).at_rest()
    assert "clip_text" in Statistics(url, server.admin_key).at_rest()


def test_clients_are_told_nothing_of_the_shared_memory(server, repository):
    regions = {path.name for path in Path("/dev/shm").glob("clip-deploy-*")}
    prefixes = {re.match("clip-deploy-[0-9a-f]{16}", name)[0] for name in regions}
    assert prefixes
    _, told = ask_http(server, "GET", "", {})
    name = json.loads(told)["name"]
    assert not any(name.startswith(prefix) or prefix in name for prefix in prefixes)
    models = [config.parent.name for config in repository.glob("*/config.pbtxt")]
    assert len(models) == 7
    for model in models:
        for path in (f"models/{model}", f"models/{model}/config"):
            status, body = ask_http(server, "GET", path, {})
            assert status == 200
            for secret in (str(repository), str(CHECKOUT), *prefixes):
                assert secret not in body.decode()


# ------------------------------------------------------------------ what errors tell

BREAK_PREPROCESS = '''

class TritonPythonModel(TritonPythonModel):
    """Broken by a test: it looks for a file that is not there any more."""

    def respond(self, request):
        data = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().ravel()[0]
        if data.startswith(b"II"):
            Path(__file__).with_name("gone.bin").read_bytes()
        return super().respond(request)
'''
BREAK_TOKENIZE = '''

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
    """A server whose models fail at certain inputs; the text tower by ONNX Runtime itself."""
    path = tmp_path_factory.mktemp("broken") / "repository"
    shutil.copytree(repository, path)
    for model, source in (
        ("image_preprocess", BREAK_PREPROCESS),
        ("text_tokenize", BREAK_TOKENIZE),
        ("clip_zero_shot", BREAK_ZERO_SHOT),
    ):
        with (path / model / "1" / "model.py").open("a") as file:
            file.write(source)
    # A manifest that knows more tokens than the graph: the ids reach the graph's own check.
    manifest = path / "text_tower" / "1" / "bundle" / "manifest.json"
    known = Bundle.open(manifest.parent).manifest
    more = replace(known, text=replace(known.text, vocab_size=1_000_000))
    manifest.write_text(more.to_json())
    with TritonServer(path, **ANY, log=path.with_suffix(".log")) as running:
        yield running


FAILURES = {
    "image_preprocess": ("image_preprocess", {"image": [TIFF]}, (1,), "gone.bin"),
    "its ensemble": ("clip_image", {"image": [TIFF]}, (1,), "gone.bin"),
    "text_tokenize": ("text_tokenize", {"text": [b"break"]}, (1,), "clip-deploy-region"),
    "the text ensemble": ("clip_text", {"text": [b"break"]}, (1,), "clip-deploy-region"),
    "clip_zero_shot": ("clip_zero_shot", {"LABELS": [b"break", b"a"]}, (), "No space left"),
    "what it calls": ("clip_zero_shot", {"IMAGE": [TIFF], "LABELS": [b"a"]}, (), "gone.bin"),
}


def logged(server, message):
    """The line of the log that has the id of an error message, after looking at the message."""
    found = re.search(r"internal error ([0-9a-f]{8}); the server's log has it$", message)
    assert found, message
    assert "/" not in message
    assert "clip-deploy" not in message
    assert "Traceback" not in message
    deadline, lines = time.monotonic() + 30, []
    while not lines and time.monotonic() < deadline:  # a thread of Triton's writes it
        text = server.log.read_text().rpartition("\n")[0]  # whole lines
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
    return failure.value.message()


def test_an_internal_error_is_an_id(broken, picture, figure):
    told = {
        internal_error(broken, picture, where, protocol)
        for where in FAILURES
        for protocol in PROTOCOLS
    }
    assert len(told) == 2 * len(FAILURES)  # no id comes twice
    figure("errors", f"{len(told)} of {len(told)} without inside, such as {sorted(told)[0]!r}")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_same_server_answers_all_others(broken, picture, protocol):
    module, client = raw(broken, protocol)
    with client:
        client.infer("clip_image", strings(module, (1,), image=[picture]))
        client.infer("clip_text", strings(module, (1,), text=[b"a cat"]))
        client.infer("clip_zero_shot", strings(module, IMAGE=[picture], LABELS=[b"a", b"b"]))
        with pytest.raises(InferenceServerException, match="got 0 bytes") as refused:
            client.infer("clip_image", strings(module, (1,), image=[b""]))
        assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_a_request_that_a_runtime_refuses_fails_alone(broken, fp32_bundle, figure):
    """ONNX Runtime refuses a whole batch for one row, and says where its own source file lies."""
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


def test_a_dead_stub_tells_nothing_of_the_inside(tmp_path, figure):
    repository = tiny_repository(tmp_path / "dying")
    with TritonServer(repository, **ANY, log=tmp_path / "log") as running:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
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
def test_malformed_requests_tell_nothing_of_the_inside(server, repository, case):
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


# ------------------------------------------------------------------ files that are read

PACKAGES = ("serving", "model_repository", "export", "training", "benchmarks", "tests")
TREE = [path for package in PACKAGES for path in sorted((CHECKOUT / package).rglob("*.py"))]
NEVER = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cPickle.load",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "pandas.read_pickle",
    "pd.read_pickle",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "eval",
    "exec",
}
"""Run what a file says."""


def dotted(node):
    """`a.b.c` of a call's function; "" of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_loads(source):
    """Lines of a module that may run what they read, each with why."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve"):
            found.append(f"{node.lineno}: names imported from {node.module}")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func).replace("numpy.", "np.")
        given = {
            keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else "?"
            for keyword in node.keywords
        }
        if (
            name in NEVER
            or (name == "torch.load" and given.get("weights_only") is not True)
            or given.get("allow_pickle", False) is not False
            or given.get("trust_remote_code", False) is not False
            or (given.get("weights_only", True) is not True)
        ):
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=x)",
        "joblib.load(path)",
        "Model.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_the_search_below_finds(line):
    assert unsafe_loads(line)


def test_nothing_in_the_tree_unpickles(figure):
    assert len(TREE) > 150
    found = {
        f"{path.relative_to(CHECKOUT)}:{problem}"
        for path in TREE
        for problem in unsafe_loads(path.read_text(encoding="utf-8"))
    }
    assert found == set()
    figure("unpickling", f"0 calls in {len(TREE)} modules")


class Bomb:
    """Unpickled the ordinary way, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def malicious_npy(victim):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(victim)], dtype=object))
    return buffer.getvalue()


def test_the_bomb_would_go_off(tmp_path):
    victim = tmp_path / "victim"
    load = "import sys, numpy; numpy.load(sys.argv[1], allow_pickle=True)"
    (tmp_path / "bomb.npy").write_bytes(malicious_npy(victim))
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "bomb.npy")], check=True)
    assert victim.exists()


def test_a_search_index_does_not_unpickle(tiny_bundle, pictures, tmp_path):
    from serving.clients.local import LocalClip
    from serving.util.files import sha256_of

    pytest.importorskip("faiss", reason="no faiss: pip install 'clip-deploy[search]'")
    index, victim = tmp_path / "index", tmp_path / "victim"
    with LocalClip(tiny_bundle.path) as clip:
        build_index(pictures, index, clip)
    manifest = json.loads((index / "manifest.json").read_text())
    file = manifest["embeddings"]
    (index / file["name"]).write_bytes(malicious_npy(victim))
    # Whoever writes the file writes the manifest too: its sums do not protect from that.
    file |= {"sha256": sha256_of(index / file["name"])}
    file |= {"bytes": (index / file["name"]).stat().st_size}
    (index / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="holds no embeddings"):
        SearchIndex.open(index)
    assert not victim.exists()


def test_a_saved_classifier_does_not_unpickle(tiny_bundle, tmp_path):
    from serving.clients.local import LocalClip

    file, victim = tmp_path / "labels.npz", tmp_path / "victim"
    with file.open("wb") as stream:
        np.savez(stream, facts=np.array([Bomb(victim)], dtype=object), embeddings=np.zeros(1))
    with (
        LocalClip(tiny_bundle.path) as clip,
        pytest.raises(InputError, match="is not a saved classifier"),
    ):
        ZeroShotClassifier.load(file, clip)
    assert not victim.exists()
