"""Tests of the embedded server at paths that a shell or an ASCII interpreter cannot take."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from serving.errors import InputError, ServerError
from serving.triton import supervisor
from serving.triton.network import choose_ports
from serving.triton.server import TritonServer
from tests.support.devices import device
from tests.support.paths import CHECKOUT
from tests.support.requests import ANY, tiny_repository

ODD = ("a b", "a'b", 'a"b', "a;b", "a$HOME", "a(b", "ünï 猫", "a\\b", "-a", "a&b")


@pytest.mark.parametrize("name", ODD)
def test_repository_at_an_odd_path_is_served(tmp_path, name):
    repository = tiny_repository(tmp_path / name)
    with TritonServer(repository, **ANY, log=tmp_path / name / "log") as server:
        assert server.fault() is None
        assert server.repository == repository


def test_up_works_in_an_odd_working_directory(tmp_path):
    """The default repository is relative to the working directory."""
    home = tmp_path / "my projects, ünï"
    tiny_repository(home / "build" / "model_repository")
    temporary = home / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "serving", "up", "--json"]
    ports = [part for name in ("http", "grpc", "metrics") for part in (f"--{name}-port", "0")]
    environment = os.environ | {
        "PYTHONPATH": str(CHECKOUT),
        "TMPDIR": str(temporary),
        "LC_ALL": "C",
    }
    with subprocess.Popen(
        command + ports, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        line = process.stdout.readline()
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert line.startswith(b'{"http"'), told
    assert process.returncode == 0


def test_error_names_the_repository_and_not_the_link_to_it(tmp_path):
    repository = tiny_repository(tmp_path / "a b")
    (repository / "idle" / "1" / "model.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ServerError) as failed, TritonServer(repository, **ANY):
        pass
    assert str(repository / "idle") in str(failed.value)
    assert "clip-deploy-triton-" not in failed.value.reason.split("\n", 1)[1]


def test_stopped_server_leaves_no_directories(tmp_path):
    """The Python backend creates one in /tmp at each start, whatever TMPDIR is."""

    def environments():
        return set(Path("/tmp").glob("python_env_*"))

    before = environments()
    with TritonServer(tiny_repository(tmp_path / "idle"), **ANY):
        created = environments() - before  # and those of servers that other tests start meanwhile
        assert created
    assert any(not path.exists() for path in created)


def test_supervisor_removes_only_empty_directories_of_its_command(tmp_path):
    older = Path(tempfile.mkdtemp(prefix="python_env_", dir="/tmp"))
    script = "mktemp -d /tmp/python_env_XXXXXX; d=$(mktemp -d /tmp/python_env_XXXXXX); "
    script += "touch $d/used; echo $d"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), "5"]
    command += [str(scratch), "no-such-region", "sh", "-c", script]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        empty, used = map(Path, ran.stderr.split())
        assert (empty.exists(), used.exists(), older.exists()) == (False, True, True)
    finally:
        older.rmdir()
    shutil.rmtree(used)


def test_command_of_the_supervisor_has_a_large_stack(tmp_path):
    command = [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), "5"]
    command += [str(tmp_path / "none"), "no-such-region", "sh", "-c", "ulimit -s"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stderr) << 10 in (supervisor.STACK_BYTES, supervisor.STRICT_STACK_BYTES)


@pytest.mark.parametrize("kind", ["directory", "device", "pipe", "long name", "below a file"])
def test_log_that_cannot_be_written_is_refused(tmp_path, kind):
    logs = {
        "directory": tmp_path,
        "device": device("null", tmp_path),
        "pipe": tmp_path / "pipe",
        "long name": tmp_path / ("x" * 300),
        "below a file": tmp_path / "file" / "log",
    }
    os.mkfifo(logs["pipe"])
    (tmp_path / "file").touch()
    repository = tiny_repository(tmp_path / "idle")
    with pytest.raises(InputError), TritonServer(repository, **ANY, log=logs[kind]):
        pass


@pytest.mark.parametrize("port", [-1, 65536, 2**40])
def test_port_out_of_range_is_refused(port):
    with pytest.raises(InputError, match="expected a port from 1 to 65535"):
        choose_ports(0, port, 0)
