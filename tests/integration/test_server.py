"""Tests of the embedded Triton server, with real server processes."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from serving.clients.endpoint import attach
from serving.errors import ServerError
from serving.triton import embedded, shutdown
from serving.triton import server as server_module
from serving.triton.network import Ports, choose_ports
from serving.triton.server import TritonServer, log_errors, server_flags
from tests.support.paths import CHECKOUT
from tests.support.servers import make_repository, wait_until

if importlib.util.find_spec("pytriton") is None:
    pytest.skip("no nvidia-pytriton: pip install 'clip-deploy[embedded]'", allow_module_level=True)

ANY = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}

ECHO = """
import numpy
import triton_python_backend_utils as pb

import serving.errors


class TritonPythonModel:
    def initialize(self, args):
        print("echo runs with numpy", numpy.__version__, "and", serving.errors.__name__, flush=True)

    def execute(self, requests):
        return [pb.InferenceResponse([
            pb.Tensor("SAME_" + name, pb.get_input_tensor_by_name(request, name).as_numpy())
            for name in ("TEXT", "PIXELS")
        ]) for request in requests]
"""
BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("the engine is for another GPU\\nrun make engine")
"""
HANGING = """
import time

class TritonPythonModel:
    def execute(self, requests):
        print("in execute", flush=True)
        time.sleep(60)
"""
SLOW = """
import time

class TritonPythonModel:
    def initialize(self, args):
        time.sleep(60)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return make_repository(tmp_path_factory.mktemp("repository"), echo=ECHO)


@pytest.fixture(scope="module")
def server(repository):
    with TritonServer(repository, **ANY, log=repository.with_suffix(".log")) as running:
        yield running


@contextmanager
def client(url):
    scheme, _, address = url.partition("://")
    kind = {"grpc": tritonclient.grpc, "http": tritonclient.http}[scheme]
    with kind.InferenceServerClient(address) as opened:
        yield kind, opened


ONE_TEXT = np.array([["a"]], dtype=object)
ONE_PIXEL = np.zeros((1, 1), dtype=np.uint8)


def echo_inputs(kind, text, pixels):
    inputs = [
        kind.InferInput("TEXT", text.shape, "BYTES"),
        kind.InferInput("PIXELS", pixels.shape, "UINT8"),
    ]
    inputs[0].set_data_from_numpy(text)
    inputs[1].set_data_from_numpy(pixels)
    return inputs


def processes_about(text):
    """Command lines of all processes that contain `text`, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # the process has ended
            continue
        if str(text) in line:
            found.append(line)
    return found


def shared_memory_of(pid):
    """Files in /dev/shm that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    found = {Path(line.split()[-1]) for line in maps.splitlines() if " /dev/shm/" in line}
    assert found, "the Python backend talks to its stubs through shared memory"
    return found


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_round_trip_of_bytes_and_uint8(server, protocol):
    text = np.array([["a"], ["ü \0 猫"]], dtype=object)
    pixels = np.arange(512, dtype=np.uint8).reshape(2, 256)
    url = server.http_url if protocol == "http" else server.grpc_url
    attach(url)
    with client(url) as (kind, opened):
        result = opened.infer("echo", echo_inputs(kind, text, pixels))
    same = [item.decode() for item in result.as_numpy("SAME_TEXT").ravel()]
    assert same == text.ravel().tolist()
    np.testing.assert_array_equal(result.as_numpy("SAME_PIXELS"), pixels)


def test_models_import_serving_from_this_environment(server):
    assert f"echo runs with numpy {np.__version__} and serving.errors" in server.log.read_text()


def test_pid_is_tritonserver_and_metrics_are_served(server):
    assert Path(f"/proc/{server.pid}/exe").resolve().name == "tritonserver"
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics") as answer:
        assert b"nv_inference_request_summary_us" in answer.read()


@pytest.mark.parametrize(
    "path", ["repository/index", "repository/models/echo/unload", "systemsharedmemory/status"]
)
def test_administration_is_rejected_over_http(server, path):
    method = "GET" if path.endswith("status") else "POST"
    request = urllib.request.Request(f"{server.http_url}/v2/{path}", method=method)
    with pytest.raises(urllib.error.HTTPError, match="403") as refusal:
        urllib.request.urlopen(request)
    refusal.value.close()


@pytest.mark.parametrize(
    "call", ["get_model_repository_index", "get_system_shared_memory_status", "get_log_settings"]
)
def test_administration_is_rejected_over_grpc(server, call):
    with (
        client(server.grpc_url) as (_, opened),
        pytest.raises(tritonclient.utils.InferenceServerException, match="restricted"),
    ):
        getattr(opened, call)()


def test_two_servers_run_at_once(server, repository):
    with TritonServer(repository, **ANY) as second:
        assert second.pid != server.pid
        attach(second.http_url)
        attach(server.http_url)
    second.log.unlink()
    attach(server.grpc_url)


def test_stop_leaves_no_processes_and_no_shared_memory(tmp_path):
    repository = make_repository(tmp_path / "clean", echo=ECHO)
    with TritonServer(repository, **ANY, log=tmp_path / "log") as running:
        shared = shared_memory_of(running.pid)
        assert len(processes_about(repository)) == 3  # supervisor, tritonserver, stub
    assert processes_about(repository) == []
    assert not any(region.exists() for region in shared)
    assert "Started HTTPService" in running.log.read_text()


def test_processes_of_a_model_stop_in_parallel(tmp_path):
    repository = make_repository(tmp_path / "many", processes=12, echo=ECHO)
    with TritonServer(repository, **ANY, log=tmp_path / "log"):
        assert len(processes_about(repository)) == 2 + 12
        started = time.monotonic()
    assert time.monotonic() - started < 9  # Triton itself stops them one by one, 1 s each
    assert processes_about(repository) == []


def test_hanging_model_is_killed_after_the_exit_timeout(tmp_path):
    # Two processes of a model: the idle one does not reveal that the other hangs.
    repository = make_repository(tmp_path / "hanging", processes=2, hang=HANGING)
    with (
        TritonServer(repository, **ANY, log=tmp_path / "log", exit_timeout=3) as running,
        client(running.grpc_url) as (kind, opened),
    ):
        shared = shared_memory_of(running.pid)
        opened.async_infer("hang", echo_inputs(kind, ONE_TEXT, ONE_PIXEL), lambda **_: None)
        wait_until(lambda: "in execute" in running.log.read_text())
        started = time.monotonic()
    assert 3 <= time.monotonic() - started < 3 + 3 * shutdown.UNLOAD_S
    assert processes_about(repository) == []
    assert not any(region.exists() for region in shared)


PARENT = """
import os, signal, sys, time
from pathlib import Path
from serving.triton.server import TritonServer

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.stderr = open(os.devnull, "w")  # a KeyboardInterrupt is expected
with TritonServer(Path(sys.argv[1]), http_port=0, grpc_port=0, metrics_port=0,
                  log=Path(sys.argv[2])) as server:
    print(server.pid, flush=True)
    time.sleep(60)
"""


@contextmanager
def parent_process(repository):
    """Process that waits inside `with TritonServer`, in its own process group as in a terminal."""
    command = [sys.executable, "-c", PARENT, str(repository), str(repository) + ".log"]
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, process_group=0
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_server_ends_with_its_parent_process(tmp_path, ending):
    repository = make_repository(tmp_path / "orphans", echo=ECHO)
    with parent_process(repository) as process:
        shared = shared_memory_of(int(process.stdout.readline()))
        os.killpg(process.pid, ending)  # the whole group, as Ctrl-C does
        process.wait(10)
    wait_until(lambda: not processes_about(repository))
    assert not any(region.exists() for region in shared)


def test_server_ends_when_its_parent_is_killed_during_loading(tmp_path):
    repository = make_repository(tmp_path / "loading", slow=SLOW)
    with parent_process(repository) as process:
        wait_until(lambda: any("stub" in line for line in processes_about(repository)))
        process.kill()
    wait_until(lambda: not processes_about(repository))


def test_server_ends_with_its_supervisor(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # files remain
    repository = make_repository(tmp_path / "supervisor", echo=ECHO)
    with TritonServer(repository, **ANY, log=tmp_path / "log") as running:
        status = Path(f"/proc/{running.pid}/status").read_text()
        supervisor = int(status.partition("PPid:")[2].split()[0])
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not processes_about(repository))


def test_failed_model_load_is_reported_at_once(tmp_path):
    # The slow model still loads for a minute when the broken one has failed.
    repository = make_repository(tmp_path / "broken", broken=BROKEN, slow=SLOW)
    started = time.monotonic()
    with (
        pytest.raises(ServerError) as failure,
        TritonServer(repository, **ANY, log=tmp_path / "log"),
    ):
        pass
    assert time.monotonic() - started < 2 * shutdown.UNLOAD_S + 5
    for part in ("broken", "the engine is for another GPU\nrun make engine", str(tmp_path / "log")):
        assert part in failure.value.reason
    assert processes_about(repository) == []


@pytest.mark.parametrize("times", [1, 9])
def test_known_triton_crash_during_loading_is_retried(tmp_path, times):
    crash = f"""
import os, signal
from pathlib import Path

class TritonPythonModel:
    def initialize(self, args):
        seen = Path({str(tmp_path / "seen")!r})
        with seen.open("a") as log:
            log.write("x")
        if len(seen.read_text()) <= {times}:
            print("boost::interprocess::lock_exception", flush=True)
            os.kill(os.getppid(), signal.SIGABRT)
"""
    repository = make_repository(tmp_path / "crashing", crash=crash)
    server = TritonServer(repository, **ANY, log=tmp_path / "log")
    if times == 1:
        with server:
            attach(server.http_url)
    else:
        with pytest.raises(ServerError, match="Triton did not start"):
            server.__enter__()
    assert len((tmp_path / "seen").read_text()) == min(times + 1, 3)
    assert processes_about(repository) == []


def test_invalid_model_configuration_is_reported(tmp_path):
    repository = make_repository(tmp_path / "typo", echo=ECHO)
    (repository / "echo" / "config.pbtxt").write_text('backend: "python"\nmax_batch_sise: 8\n')
    with pytest.raises(ServerError, match=r"no field named \"max_batch_sise\"[\s\S]*'echo'"):
        TritonServer(repository, **ANY, log=tmp_path / "log").__enter__()


def test_ready_timeout_is_reported(tmp_path):
    repository = make_repository(tmp_path / "late", slow=SLOW)
    with pytest.raises(ServerError, match=r"not ready within 0\.5 s"):
        TritonServer(repository, **ANY, log=tmp_path / "log", ready_timeout=0.5).__enter__()
    assert processes_about(repository) == []


def test_missing_repository_is_rejected(tmp_path):
    with pytest.raises(ServerError, match="expected a model repository"):
        TritonServer(tmp_path / "nowhere").__enter__()


@pytest.mark.parametrize("which", ["http_port", "grpc_port", "metrics_port"])
def test_port_in_use_is_reported(tmp_path, which):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = TritonServer(tmp_path, **(ANY | {which: port}))
        with pytest.raises(ServerError, match=rf"127\.0\.0\.1:{port}: .*in use.* give port 0"):
            server.__enter__()


def test_free_ports_are_distinct():
    free = choose_ports(0, 0, 0)
    assert len(set(free)) == 3
    with pytest.raises(ServerError, match=f":{free.http}: .*in use"):
        choose_ports(free.http, free.http, 0)


@pytest.mark.parametrize("which", ["http_port", "grpc_port", "metrics_port"])
def test_requested_port_lost_in_a_race_is_reported(repository, tmp_path, monkeypatch, which):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = choose_ports(0, 0, 0)._replace(**{which.removesuffix("_port"): port})
        monkeypatch.setattr(
            server_module, "choose_ports", lambda *_: ports
        )  # as if the port had been free
        with pytest.raises(ServerError, match=f":{port}: it was taken while"):
            TritonServer(repository, log=tmp_path / "log", **{which: port}).__enter__()
    assert processes_about(tmp_path) == []


@pytest.mark.parametrize("which", Ports._fields)
def test_free_port_lost_in_a_race_is_replaced(repository, tmp_path, monkeypatch, which):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        choices = [choose_ports(0, 0, 0), choose_ports(0, 0, 0)]
        choices[0] = choices[0]._replace(**{which: port})
        monkeypatch.setattr(server_module, "choose_ports", lambda *_: choices.pop(0))
        with TritonServer(repository, **ANY, log=tmp_path / "log") as server:
            assert not choices
            assert getattr(server.ports, which) != port
            attach(server.http_url)


def test_other_triton_on_the_same_port_is_detected(server, repository, tmp_path, monkeypatch):
    urls = (server.http_url, server.grpc_url, server.metrics_url)
    ports = Ports(*(int(url.rpartition(":")[2]) for url in urls))
    monkeypatch.setattr(server_module, "choose_ports", lambda *_: ports)
    with pytest.raises(ServerError, match="it was taken while"):
        TritonServer(
            repository,
            log=tmp_path / "log",
            http_port=ports.http,
            grpc_port=ports.grpc,
            metrics_port=ports.metrics,
        ).__enter__()
    attach(server.http_url)


def test_attach_errors_name_the_url(server):
    with pytest.raises(ServerError, match="expected grpc://host:port"):
        attach("localhost:8000")
    swapped = [server.http_url.replace("http", "grpc"), server.grpc_url.replace("grpc", "http")]
    for url in [
        *swapped,
        f"http://{server.metrics_url}",
        "grpc://127.0.0.1:1",
        "http://127.0.0.1:1",
    ]:
        with pytest.raises(ServerError, match=f"no Triton server answers at {url}"):
            attach(url, timeout=2)


def test_attach_to_a_silent_server_times_out():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for scheme in ("grpc", "http"):
            with pytest.raises(ServerError, match="no Triton server answers"):
                attach(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)


def test_log_errors_skips_messages_about_missing_gpus():
    log = r"""
I1120 19:01:12.469339 3775 model_lifecycle.cc:472] "loading: bad:1"
E1120 19:01:12.467146 3775 server.cc:241] "CudaDriverHelper has not been initialized."
E1120 19:01:12.834706 3775 backend_model.cc:692] "ERROR: Failed to create instance: ValueError: no"
E1120 19:01:12.834888 3775 model_lifecycle.cc:642] "failed to load 'bad' version 1: Internal: no\n"
E1120 19:01:12.834999 3775 ensemble.cc:1] "unable to create stream for ens: CUDA driver version"
E1120 19:03:06.203810 4365 main.cc:245] "failed to start GRPC service: Socket in use "
Error: Failed to initialize NVML
error: creating server: Internal - failed to load all models"""
    assert log_errors(log) == [
        "failed to load 'bad' version 1: Internal: no",
        "failed to start GRPC service: Socket in use",
        "error: creating server: Internal - failed to load all models",
    ]


def test_server_flags_depend_on_the_triton_release():
    def names(version):
        flags = server_flags(
            version,
            repository=Path("/r"),
            ports=Ports(1, 2, 3),
            cache_bytes=4,
            exit_timeout=5,
            key="k",
        )
        return {flag.partition("=")[0] for flag in flags}

    newer = {"--http-max-input-size", "--allow-client-shm"}
    assert names((2, 51)).isdisjoint(newer)
    assert names((2, 71)) == names((2, 51)) | newer


def test_missing_libpython_names_the_package(tmp_path):
    with pytest.raises(
        ServerError, match=r"libpython3\.12\.so\.1\.0.*apt-get install libpython3\.12"
    ):
        embedded.find_libpython((3, 12), [tmp_path])
    (tmp_path / "libpython3.12.so.1.0").touch()
    assert embedded.find_libpython((3, 12), [tmp_path / "no", tmp_path]) == tmp_path


def test_unsupported_python_lists_the_supported_versions():
    with pytest.raises(ServerError, match=r"3\.11, 3\.12, 3\.13; this is Python 3\.14"):
        embedded.find_stub(embedded.find_wheel(), (3, 14))


def test_numpy_2_is_rejected():
    embedded.check_numpy("1.26.4")
    with pytest.raises(ServerError, match=r"found NumPy 2\.3\.1.*pip install .*\[embedded\]"):
        embedded.check_numpy("2.3.1")


def test_missing_pytriton_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytriton", None)  # None makes the import fail
    with pytest.raises(ServerError, match=r"pip install 'clip-deploy\[embedded\]'"):
        embedded.find_wheel()
