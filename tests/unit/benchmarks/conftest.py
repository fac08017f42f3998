"""Fixtures: a real run of the latency benchmark on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

RUNNERS = ("eager:fp32", "onnxruntime:fp32", "transformers*", "onnxruntime-plain:fp32")


@pytest.fixture(scope="session")
def run_benchmarks():
    """`run_benchmarks("latency", bundle, SLOWER="29")`: run a command in its own process."""

    def run(*arguments, module="benchmarks", **variables):
        # pytest-benchmark measures nothing in processes of pytest-xdist.
        outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        environment = outside | {"PYTEST_PLUGINS": "tests.support.benchmark_plugin"} | variables
        environment["PYTHONPATH"] = str(CHECKOUT)
        # On a loaded machine, spinning PyTorch threads increased 3 ms of eager float32 to 600 ms.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=environment, check=False
        )

    return run


@pytest.fixture(scope="session")
def measured(run_benchmarks, tiny_bundle, once) -> Path:
    """A directory with the `results.json` of a latency run of a few runners. Do not change it."""
    with once("measured") as path:
        if not path.exists():
            runners = [f"--runner={pattern}" for pattern in RUNNERS]
            output = path.with_name("being measured")
            command = ("latency", tiny_bundle.path, "--budget", "0.05", "--output", output)
            done = run_benchmarks(*command, *runners)
            assert done.returncode == 0, done.stderr
            assert "x eager:fp32" in done.stdout
            output.rename(path)
    return path
