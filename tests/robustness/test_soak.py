"""Soak tests: mixed traffic leaks no memory, shared memory, file descriptors or processes."""

import os
import shutil

import pytest

from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.soaking import Traffic, at_rest, growth, leaks, watched

SECONDS = 1800.0 if os.environ.get("CLIP_SOAK") else 60.0
WARM_UP_S = 60.0 if os.environ.get("CLIP_SOAK") else 8.0
CONTROL_S = 20.0
# A small response cache fills during the warm-up; 64 MiB would fill for half an hour.
ANY = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "cache_bytes": 1 << 20}
LEAK = '''

KEPT = []


class TritonPythonModel(TritonPythonModel):
    """Broken by a test: it keeps 100 kB of every batch of requests."""

    def execute(self, requests):
        KEPT.append(b"x" * 100_000)
        return super().execute(requests)
'''


@pytest.fixture(scope="module")
def repository(tiny_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("soak") / "repository"
    assemble(tiny_bundle, path, runner="onnxruntime:fp32", max_batch_size=16)
    config = path / "clip_zero_shot" / "config.pbtxt"
    config.write_text(config.read_text().replace("67108864", "50000"))  # causes evictions
    return path


def test_mixed_traffic_leaks_nothing(repository, tiny_bundle, figure):
    for _ in range(2):
        with TritonServer(repository, **ANY) as server:
            Traffic(server, tiny_bundle, WARM_UP_S).run()
            before = at_rest(server)
            traffic = Traffic(server, tiny_bundle, SECONDS)
            with watched(server) as samples:
                traffic.run()
            after = at_rest(server, before)
        # Triton 2.51 sometimes crashes when a gRPC client cancels a call, which one of the users
        # does all the time: github.com/triton-inference-server/server/issues/8034.
        if "Signal (11) received" not in server.log.read_text():
            break
    grown, risen = growth(samples)
    figure(
        "soak",
        f"{SECONDS:.0f} s, {sum(traffic.answers.values()):,} calls of {len(traffic.answers)} kinds "
        f"of users: memory {before.rss_bytes / 1e6:.0f} MB, grew by {grown / 1e6:.1f} MB, slope of "
        f"the second half {risen / 1e6:+.1f} MB; /dev/shm entries {before.shared_memory} before, "
        f"{after.shared_memory} after; file descriptors {before.files} before, {after.files} after",
    )
    assert traffic.unexpected == []
    assert min(traffic.answers.values()) > 0
    assert not leaks(samples)
    assert after.shared_memory == before.shared_memory > 0
    assert after.files <= before.files + 2  # Triton opens some files on first use
    assert after.processes == before.processes


def test_deliberate_leak_is_detected(repository, tiny_bundle, tmp_path, figure):
    """A preprocessing model that keeps 100 kB per batch of requests is detected."""
    leaking = shutil.copytree(repository, tmp_path / "repository")
    with (leaking / "image_preprocess" / "1" / "model.py").open("a") as file:
        file.write(LEAK)
    with TritonServer(leaking, **ANY) as server:
        Traffic(server, tiny_bundle, 4.0).run()
        with watched(server) as samples:
            Traffic(server, tiny_bundle, CONTROL_S).run()
    grown, risen = growth(samples)
    figure(
        "soak, deliberate leak",
        f"caught in {CONTROL_S:.0f} s: grew by {grown / 1e6:.0f} MB, slope {risen / 1e6:+.0f} MB",
    )
    assert leaks(samples)
