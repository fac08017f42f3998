"""Commands on local files send nothing: no connection outside loopback, no lookup of a host."""

import importlib.util
import os
import subprocess
import sys

import psutil
import pytest

from serving.util.telemetry import ABSENT, OFF
from tests.support.network import record, why_not
from tests.support.paths import CHECKOUT

reason = why_not()
recorded = pytest.mark.skipif(reason is not None, reason=reason or "")

SESSION = """
import onnxruntime
from onnx import TensorProto, helper
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "graph", [x], [y])
opset = [helper.make_opsetid("", 20)]
model = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
"""
CLOUD = {"169.254.169.254", "8.8.8.8"}
CLOUD_NAMES = {"metadata.google.internal"}
"""Ray (2.60) asks for the name of the cloud that it runs in, whatever its settings, and keeps the
answer on this machine. It connects a UDP socket to 8.8.8.8 to learn this machine's own address,
without sending anything."""


def own_addresses():
    return {each.address for some in psutil.net_if_addrs().values() for each in some}


def silent(traffic):
    assert traffic.addresses == set()
    assert traffic.names == set()
    assert traffic.stored == []


@pytest.mark.parametrize("package", ["serving", "export", "benchmarks", "training"])
def test_every_package_turns_telemetry_off_before_other_imports(package):
    code = f"import os, sys, {package}; print([os.environ.get(n) for n in {list(OFF)!r}])\n"
    code += f"assert sys.modules[{ABSENT!r}] is None\n"
    code += "assert not {'onnxruntime', 'openvino', 'ray', 'huggingface_hub'} & set(sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in OFF}
    for given, expected in ({}, OFF), (dict.fromkeys(OFF, "kept"), dict.fromkeys(OFF, "kept")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=CHECKOUT,
            env=environment | given,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip() == str(list(expected.values())), done.stderr


@recorded
def test_recorder_sees_connections_and_lookups(tmp_path):
    code = "import socket, contextlib\nwith contextlib.suppress(OSError):\n"
    code += "    socket.getaddrinfo('host.example.invalid', 80)\n"
    code += "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.1', 9))"
    traffic = record([sys.executable, "-c", code], tmp_path / "home")
    assert traffic.addresses == {"192.0.2.1"}
    assert traffic.names == {"host.example.invalid"}


@recorded
@pytest.mark.parametrize("on", [True, False])
def test_onnx_runtime_stores_events_only_with_telemetry(tmp_path, on):
    """The store is written when a graph is loaded; the events are sent some seconds later."""
    code = SESSION if on else f"import serving\n{SESSION}"
    stored = record([sys.executable, "-c", code], tmp_path / "home").stored
    assert bool(stored) == on


@recorded
def test_openvino_is_imported_without_an_event(tmp_path):
    silent(record([sys.executable, "-c", "import serving, openvino"], tmp_path / "off"))
    traffic = record([sys.executable, "-c", "import openvino"], tmp_path / "on")
    assert traffic.names == {"www.google-analytics.com"}


@recorded
def test_export_and_search_of_local_files_are_silent(
    tiny_checkpoint, pictures, tmp_path, vocabulary
):
    bundle, index = tmp_path / "bundle", tmp_path / "index"
    python = [sys.executable, "-m"]
    export = [*python, "export", tiny_checkpoint, "--output", bundle, "--precision", "int8"]
    silent(record(export, tmp_path / "export"))
    build = [*python, "serving", "search", "build", pictures, "--output", index]
    silent(record([*build, "--bundle", bundle], tmp_path / "build"))
    query = [*python, "serving", "search", "query", index, "a cat", "--bundle", bundle]
    silent(record(query, tmp_path / "query"))


@recorded
def test_assembly_and_embedded_server_are_silent(fp32_bundle, pictures, tmp_path):
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip("no nvidia-pytriton: pip install 'clip-deploy[embedded]'")
    labels = tmp_path / "labels.txt"
    labels.write_text("a cat\na dog\n")
    demo = [sys.executable, "-m", "serving", "demo", fp32_bundle.path, pictures]
    demo += ["--labels", labels, "--query", "a cat", "--sheet", tmp_path / "sheet.png"]
    traffic = record([*demo, "--output", tmp_path / "repository"], tmp_path / "home")
    assert "HTTP and gRPC differ" in traffic.output
    silent(traffic)


@recorded
def test_bulk_of_local_files_sends_nothing_of_ours(fp32_bundle, pictures, tmp_path):
    command = [sys.executable, "-m", "serving", "bulk", pictures, "--output", tmp_path / "out"]
    command += ["--bundle", fp32_bundle.path, "--runner", "onnxruntime:fp32", "--workers", "1"]
    traffic = record(command, tmp_path / "home")
    assert traffic.stored == []
    assert traffic.addresses <= own_addresses() | CLOUD
    assert traffic.names <= CLOUD_NAMES
