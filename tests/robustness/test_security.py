"""Tests of network exposure and of the key for administrative calls."""

import http.client
import importlib.util
import json
import re
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from contextlib import closing, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from benchmarks.load.step_times import Statistics
from serving.clients.endpoint import admin_headers
from serving.errors import InputError, ServerError
from serving.triton.network import ADMIN_APIS, HOST, Exposure, Ports, ServerTls
from serving.triton.server import TritonServer, server_flags
from tests.support.paths import CHECKOUT
from tests.support.requests import ANY, PROTOCOLS, ask_http, raw, tiny_repository

if importlib.util.find_spec("pytriton") is None:
    pytest.skip("no nvidia-pytriton: pip install 'clip-deploy[embedded]'", allow_module_level=True)

SECOND_LOOPBACK = "127.0.0.2"  # reaches sockets on 0.0.0.0, but not those on 127.0.0.1


def listening(pid):
    """`address:port` of every TCP socket on which a process listens."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor was closed
            found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
            inodes |= {found[1]} if found else set()
    addresses = set()
    for kind in ("tcp", "tcp6"):  # gRPC listens on IPv4-mapped IPv6 addresses
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = struct.iter_unpack(">I", bytes.fromhex(address))
                number = ip_address(b"".join(struct.pack("<I", *word) for word in words))
                address = getattr(number, "ipv4_mapped", None) or number
                addresses.add(f"{address}:{int(port, 16)}")
    return sorted(addresses)


def test_default_exposure_is_loopback_only(server, figure):
    sockets = listening(server.pid)
    assert len(sockets) == 3
    assert {socket.partition(":")[0] for socket in sockets} == {HOST}
    assert server.exposed == []
    figure("loopback", f"3 of 3 listening sockets on {HOST}, also with AIP_MODE=PREDICTION")


def test_up_with_another_host_reports_what_is_exposed(tmp_path):
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
        "The admin key protects model-repository, shared-memory, statistics, trace, logging.",
        f"Metrics stay on {HOST}",
        "2.51 from 2024-10, which all later security bulletins affect",
        "SECURITY.md",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("localhost", r"expected an IPv4 address .* got 'localhost'"),
        ("::1", r"expected an IPv4 address"),
        ("192.0.2.1", r"192\.0\.2\.1 is not an address of this machine"),  # reserved by RFC 5737
    ],
)
def test_invalid_host_is_rejected(tmp_path, host, message):
    with pytest.raises(InputError, match=message):
        TritonServer(tmp_path, **ANY, host=host).__enter__()


def test_server_flags_depend_on_release_and_exposure(tmp_path):
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


def test_administration_requires_the_key_over_http(server, figure):
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


def test_administration_requires_the_key_over_grpc(server, figure):
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
"""Alternative spellings of one path, as in CVE-2026-24206 and CVE-2026-24207."""


def test_path_spellings_do_not_bypass_the_key(server, figure):
    address = server.http_url.removeprefix("http://")
    for spelling in SPELLINGS:
        with closing(http.client.HTTPConnection(address, timeout=10)) as connection:
            connection.request("POST", spelling, body=b"{}")
            with connection.getresponse() as answer:
                assert answer.status in (403, 404), spelling
    figure("administration", f"{len(SPELLINGS)} other spellings of a path refused")


def test_admin_key_is_per_server_and_not_logged(server):
    assert re.fullmatch("[0-9a-f]{32}", server.admin_key)
    assert TritonServer(server.repository).admin_key != server.admin_key
    assert server.admin_key not in server.log.read_text()


@pytest.mark.parametrize("key", ["short", "a" * 15, "with a space and more", "a,b=c:" * 5])
def test_custom_admin_key_is_validated(tmp_path, key):
    with pytest.raises(InputError, match="at least 16 letters, digits"):
        TritonServer(tmp_path, admin_key=key)
    assert TritonServer(tmp_path, admin_key="my-own_key-of-16").admin_key == "my-own_key-of-16"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_statistics_error_asks_for_the_key(server, protocol):
    url = getattr(server, f"{protocol}_url")
    for key in (None, *WRONG):
        with pytest.raises(ServerError, match=r"administrative key; give it as --admin-key"):
            Statistics(url, key).at_rest()
    assert "clip_text" in Statistics(url, server.admin_key).at_rest()
