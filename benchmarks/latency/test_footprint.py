"""Startup time and peak memory of a process that loads both towers with a runner."""

import subprocess
import sys
from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.latency.candidates import Inputs, candidate
from benchmarks.latency.record import Record
from serving.bundles.manifest import TOWERS, Tower
from serving.util.results import Footprint
from serving.util.typed_json import parse_json

_NOT_MEASURED = ("compiled", "transformers-longest")
"""Runners whose weights are those of another runner."""
_FULL_ONLY = ("torchscript:fp32", "onnxruntime-plain:fp32")


def test_footprint(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    record: Record,
    inputs: Inputs,
    name: str,
) -> None:
    """Measure a new process from its start to its first embeddings."""
    full = request.config.getoption("--full")
    if name.startswith(_NOT_MEASURED) or (not full and name in _FULL_ONLY):
        pytest.skip(f"{name}: not in this matrix")
    bundle = record.bundle_of(inputs, "footprints")
    for tower in TOWERS:  # exports graphs that the process only loads; skips unavailable runners

        def opened(tower: Tower = tower) -> None:
            with candidate(inputs, tower, name).runner:
                pass

        record.available(f"footprint, {name}", opened)
    command = [sys.executable, "-m", "benchmarks.latency.footprint"]
    command += [str(bundle.path), str(inputs.saved), str(inputs.scratch), name]
    printed: list[dict[str, float]] = []

    def run() -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(parse_json(done.stdout.splitlines()[-1]))

    benchmark.group = "footprint"
    benchmark.pedantic(run, rounds=3 if full else 1)  # type: ignore[no-untyped-call]
    if benchmark.stats is None:  # --benchmark-disable
        return
    of = {key: median(one[key] for one in printed) for key in printed[0]}
    record.add(
        Footprint(
            runner=name,
            load_s=of["load_s"],
            total_s=median(benchmark.stats.stats.data),
            before_bytes=int(of["before_bytes"]),
            loaded_bytes=int(of["loaded_bytes"]),
            peak_bytes=int(of["peak_bytes"]),
        )
    )
