"""Latency of each runner, tower and batch, by pytest-benchmark: `make bench`."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.latency import Work, batch_of
from export.build import checkpoint_of, tower_of
from export.torch_runners import EagerRunner
from serving.bundle import Bundle
from serving.runners.base import RUNNERS, Runner, open_runner

WORKS = (
    Work(tower="image", batch=1),
    Work(tower="image", batch=32),
    Work(tower="text", batch=32, length=16),
)


@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize("name", ["eager:fp32", *RUNNERS])
def test_latency(benchmark: BenchmarkFixture, bundle: Bundle, work: Work, name: str) -> None:
    """One runner on one batch."""
    precisions = {a.precision for a in bundle.manifest.artifacts}
    if name in RUNNERS and RUNNERS[name] not in precisions:
        pytest.skip(f"{bundle.path} has no {RUNNERS[name]} graph")
    runner: Runner
    if name in RUNNERS:
        runner = open_runner(bundle, work.tower, name)
    else:
        runner = EagerRunner(tower_of(checkpoint_of(bundle), work.tower))
    benchmark.group = str(work)
    with runner:
        batch = batch_of(bundle, work)
        benchmark.pedantic(runner.run, args=(batch,), rounds=7, warmup_rounds=2)  # type: ignore[no-untyped-call]
