"""What a process pays to have a runner: time to load both towers, and memory at its peak."""

import json
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.latency.candidates import Inputs, candidate
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS
from serving.errors import ClipDeployError


def test_footprint(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    bundle: Bundle,
    inputs: Inputs,
    name: str,
) -> None:
    """A new process, from its start to its first embeddings."""
    full = request.config.getoption("--full")
    if name.startswith(("compiled", "eager-cuda", "transformers-longest")):
        pytest.skip(f"{name}: see the runner it shares its weights with")
    if not full and name in ("torchscript:fp32", "onnxruntime-plain:fp32"):
        pytest.skip(f"{name}: of the full matrix only")
    try:
        for tower in TOWERS:  # makes what the process only loads, or says what is missing
            with candidate(inputs, tower, name).runner:
                pass
    except ClipDeployError as error:
        pytest.skip(f"{name}: {error}")
    command = [sys.executable, "-m", "benchmarks.latency.footprint"]
    command += [str(bundle.path), str(inputs.folder), str(inputs.scratch), name]
    told: list[dict[str, float]] = []

    def run() -> Any:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))

    benchmark.group = "footprint"
    rounds = 3 if full else 1
    call: Callable[[], Any] = run
    benchmark.pedantic(call, rounds=rounds)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(kind="footprint", runner=name)
    for key in told[0]:
        benchmark.extra_info[key] = median(one[key] for one in told)
