"""Tests of TLS and mutual TLS.

Triton itself terminates gRPC TLS; a proxy in front of its loopback port terminates HTTPS.
"""

import asyncio
import importlib.util
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import trustme

from serving.clients.endpoint import Credentials, Endpoint, attach
from serving.clients.triton import ClipClient
from serving.errors import InputError, ServerError
from serving.triton.network import HOST, ServerTls
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.paths import CHECKOUT

if importlib.util.find_spec("pytriton") is None:
    pytest.skip("no nvidia-pytriton: pip install 'clip-deploy[embedded]'", allow_module_level=True)

ANY = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
SCHEMES = ("grpcs", "https")
YESTERDAY = datetime.now(UTC) - timedelta(days=1)


class Files:
    """Files of a temporary certificate authority and of the certificates that it issues."""

    def __init__(self, folder):
        self.folder, self.authority = folder, trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)

    def issue(self, name, *hosts, **options):
        """Issue a certificate. Return the paths of the certificate and of its key."""
        issued = self.authority.issue_cert(*hosts, **options)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return {"certificate": certificate, "key": key}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def served_by(ours):
    """Server certificates by kind of defect; `good` has none."""
    return {
        "good": ours.issue("server", HOST, "localhost"),
        "expired": ours.issue("expired", HOST, not_after=YESTERDAY),
        "of another host": ours.issue("elsewhere", "clip.example.org"),
    }


@pytest.fixture(scope="module")
def client_files(ours):
    return ours.issue("client", "somebody@example.org")


@pytest.fixture(scope="module")
def server(fp32_bundle, ours, served_by, tmp_path_factory):
    """Server with all models that requires a client certificate."""
    repository = tmp_path_factory.mktemp("tls") / "repository"
    assemble(fp32_bundle, repository, runner="onnxruntime:fp32", max_batch_size=8)
    tls = ServerTls(**served_by["good"], client_ca=ours.ca)
    with TritonServer(repository, **ANY, host="0.0.0.0", tls=tls) as running:
        yield running


@contextmanager
def https_proxy(target, *, certificate, key, client_ca=None):
    """TLS proxy in front of an HTTP port on loopback, like nginx or envoy. Yields its URL."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    host, _, port = target.removeprefix("http://").partition(":")

    async def copy(reader, writer):
        with suppress(OSError):  # the peer closed the connection
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async def connected(reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    started, ports, loops = threading.Event(), [], []

    async def main():
        ended = asyncio.Event()
        loops.extend([asyncio.get_running_loop(), ended])
        async with await asyncio.start_server(connected, HOST, 0, ssl=context) as proxy:
            ports.append(proxy.sockets[0].getsockname()[1])
            started.set()
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert started.wait(10)
        yield f"https://{HOST}:{ports[0]}"
    finally:
        loops[0].call_soon_threadsafe(loops[1].set)
        thread.join()


@pytest.fixture(scope="module")
def proxy(server, ours, served_by):
    with https_proxy(server.http_url, **served_by["good"], client_ca=ours.ca) as url:
        yield url


@pytest.fixture(params=SCHEMES)
def url(request, server, proxy):
    """URL of a server that requires a client certificate."""
    return server.grpc_url if request.param == "grpcs" else proxy


def test_mutual_tls_gives_the_same_results_as_plain_http(
    server, url, ours, client_files, pictures, figure
):
    files = sorted(pictures.iterdir())
    with ClipClient(server.http_url) as plain:  # HTTP on loopback
        expected = plain.embed_images(files), plain.embed_texts(["a cat", "two dogs"])
    with ClipClient(url, credentials=Credentials(ca=ours.ca, **client_files)) as client:
        found = client.embed_images(files), client.embed_texts(["a cat", "two dogs"])
        assert client.classify(files, ["cat", "dog"]).shape == (len(files), 2)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    figure("TLS", f"{len(files)} pictures, 2 texts over {url[:5]}, both sides shown, as plain")


def refusal(url, **credentials):
    with pytest.raises(ServerError, match=f"no connection to {url}: ") as failure:
        ClipClient(url, credentials=Credentials(**credentials))
    return str(failure.value)


def test_server_certificate_of_an_untrusted_authority_is_rejected(
    url, theirs, client_files, figure
):
    for untrusting in (theirs.ca, None):
        told = refusal(url, ca=untrusting, **client_files)
        assert "from an authority that is not trusted here" in told
    figure("TLS", f"{url[:5]} refused a server certificate of another authority")


def test_missing_or_invalid_client_certificate_is_rejected(url, ours, theirs, figure):
    shown = {
        "none": {},
        "of another authority": theirs.issue("stranger", "stranger@example.org"),
        "expired": ours.issue("old", "old@example.org", not_after=YESTERDAY),
    }
    for credentials in shown.values():
        told = refusal(url, ca=ours.ca, **credentials)
        assert "if the server requires a client certificate, give one" in told
    figure("TLS", f"{url[:5]} refused client certificates: {', '.join(shown)}")


def idle(root):
    """Model repository with one model that never answers and loads within a second."""
    (root / "idle" / "1").mkdir(parents=True)
    (root / "idle" / "config.pbtxt").write_text(
        'backend: "python"\ninput [{ name: "I" data_type: TYPE_FP32 dims: [1] }]\n'
        'output [{ name: "O" data_type: TYPE_FP32 dims: [1] }]\n'
    )
    (root / "idle" / "1" / "model.py").write_text(
        "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"
    )
    return root


@contextmanager
def server_with(scheme, certificates, plain, folder):
    """URL of a server with these certificates that requires no client certificate."""
    if scheme == "https":
        with https_proxy(plain.http_url, **certificates) as found:
            yield found
        return
    tls = ServerTls(**certificates)
    with TritonServer(idle(folder / "idle"), **ANY, tls=tls, log=folder / "log") as running:
        yield running.grpc_url


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("expired", "the server's certificate has expired"),
        ("of another host", "the server's certificate is for another host"),
    ],
)
def test_expired_or_mismatched_server_certificate_is_rejected(
    server, ours, served_by, tmp_path, scheme, which, message, figure
):
    with (
        server_with(scheme, served_by[which], server, tmp_path) as url,
        pytest.raises(ServerError, match=f"no connection to {url}: {message}"),
    ):
        attach(url, credentials=Credentials(ca=ours.ca))
    figure("TLS", f"{scheme} refused a server certificate: {which}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tls_works_without_client_certificates(server, ours, served_by, tmp_path, scheme):
    with server_with(scheme, served_by["good"], server, tmp_path) as url:
        attach(url, credentials=Credentials(ca=ours.ca))
        by_name = url.replace(HOST, "localhost")
        attach(by_name, credentials=Credentials(ca=ours.ca))


def test_mismatch_of_tls_and_plain_text_is_reported(server, proxy, ours, client_files):
    credentials = Credentials(ca=ours.ca, **client_files)
    for with_tls in (server.grpc_url, proxy):
        without = with_tls.replace("s://", "://")
        with pytest.raises(ServerError, match=rf"no Triton server answers at {without}.*with TLS"):
            attach(without)
    port = server.http_url.rpartition(":")[2]
    for scheme in SCHEMES:  # Triton answers in plain HTTP or closes the connection
        reason = "(the server closed the connection|does not use TLS)"
        with pytest.raises(ServerError, match=f"no connection to {scheme}://.* {reason}"):
            attach(f"{scheme}://{HOST}:{port}", credentials=credentials)


def test_http_stays_on_loopback_with_tls(server):
    """HTTP has no TLS, so it listens on loopback only, whatever the host option says."""
    flags = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    assert f"--http-address={HOST}" in flags
    assert "--grpc-address=0.0.0.0" in flags
    other = server.http_url.replace(HOST, "127.0.0.2")
    with pytest.raises(ServerError, match="no Triton server answers"):
        attach(other)
    told = "\n".join(server.exposed)
    assert "grpcs://0.0.0.0:" in told
    assert "HTTP has no TLS and stays on loopback" in told
    assert "Clients need a certificate from" in told


# ------------------------------------------------------------------ invalid files


def test_credentials_for_an_unencrypted_url_are_rejected(ours):
    with pytest.raises(InputError, match=r"is not encrypted.*give grpcs://localhost:8001"):
        Endpoint.of("grpc://localhost:8001", Credentials(ca=ours.ca))
    with pytest.raises(ServerError, match=r"grpcs:// or https:// with TLS, got 'tls://a:1'"):
        Endpoint.of("tls://a:1", Credentials(ca=ours.ca))


def test_invalid_client_files_are_rejected_before_connecting(ours, theirs, client_files, tmp_path):
    one, other = client_files, theirs.issue("other", "other@example.org")
    (tmp_path / "text").write_text("no PEM")
    for given, message in (
        ({"certificate": one["certificate"]}, "give both, or neither"),
        ({"key": one["key"]}, "give both, or neither"),
        ({"ca": tmp_path / "gone.pem"}, r"gone\.pem: no such file"),
        ({"ca": tmp_path / "text"}, "cannot be used for TLS"),
        ({"certificate": one["certificate"], "key": other["key"]}, "cannot be used for TLS"),
    ):
        with pytest.raises(InputError, match=message):
            Endpoint.of("grpcs://localhost:1", Credentials(**given))


def test_invalid_server_files_are_rejected_before_starting(ours, theirs, served_by, tmp_path):
    """Without this check, Triton would report that its port is in use."""
    good = served_by["good"]
    (tmp_path / "text").write_text("no PEM")
    repository = idle(tmp_path / "repository")
    for given, message in (
        ({"certificate": tmp_path / "gone.pem", "key": good["key"]}, r"gone\.pem: no such file"),
        ({**good, "key": theirs.issue("x", "localhost")["key"]}, "cannot serve TLS"),
        ({**good, "client_ca": tmp_path / "text"}, "cannot serve TLS"),
    ):
        with pytest.raises(InputError, match=message):
            TritonServer(repository, **ANY, tls=ServerTls(**given)).__enter__()


# ------------------------------------------------------------------ commands


def serving(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "serving", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=CHECKOUT,
        env=os.environ | environment,
    )


def test_commands_accept_tls_options_and_variables(server, ours, client_files):
    embed = ("embed", "--text", "a cat", "--url", server.grpc_url, "--json")
    files = {"ca": ours.ca, "cert": client_files["certificate"], "key": client_files["key"]}
    given = [part for name, file in files.items() for part in (f"--{name}", file)]
    done = serving(*embed, *given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shape"] == [1, 32]
    variables = {f"CLIP_{name.upper()}": str(file) for name, file in files.items()}
    done = serving("status", "--url", server.grpc_url, "--json", **variables)
    assert done.returncode == 0, done.stderr
    assert "weights_sha256" in json.loads(done.stdout)["facts"]
    done = serving(*embed)
    assert done.returncode == 2
    assert "from an authority that is not trusted here" in done.stderr
    assert "Traceback" not in done.stderr


def test_up_serves_tls(ours, served_by, client_files, tmp_path):
    good = served_by["good"]
    options = ["--tls-cert", good["certificate"], "--tls-key", good["key"], "--client-ca", ours.ca]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    command = ["up", idle(tmp_path / "r"), *ports, "--log", tmp_path / "log", "--json", *options]
    with subprocess.Popen(
        [sys.executable, "-m", "serving", *map(str, command)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        process_group=0,
    ) as up:
        try:
            url = json.loads(up.stdout.readline())["grpc"]
            attach(url, credentials=Credentials(ca=ours.ca, **client_files))
            with pytest.raises(ServerError, match="give one that it trusts"):
                attach(url, credentials=Credentials(ca=ours.ca))
        finally:
            up.send_signal(signal.SIGINT)
    done = serving(*command[:-4], "--tls-cert", good["certificate"])
    assert done.returncode == 2
    assert "TLS needs both --tls-cert and --tls-key" in done.stderr
