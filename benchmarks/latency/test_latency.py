"""Latency of each runner on each batch, in turns with eager float32."""

from functools import partial

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.latency.candidates import Candidate, Inputs, Work, batch_of
from benchmarks.latency.record import Record
from benchmarks.latency.turns import Turns
from benchmarks.machine.limits import count_flops
from benchmarks.machine.timing import timed, timing_of
from export.gate.torch_runners import TorchRunner
from serving.bundles.manifest import Tower
from serving.runners.base import Runner
from serving.runners.spec import device_of
from serving.util.results import Timing, TowerLatency

_DEVICE_ROUNDS = 9
_BASELINE_SECONDS = 60.0
"""On a GPU, leave out a CPU baseline that is expected to take longer than this on a batch."""


def test_latency(
    benchmark: BenchmarkFixture,
    record: Record,
    inputs: Inputs,
    references: dict[Tower, Runner],
    opened: Candidate,
    work: Work,
    budget: float,
) -> None:
    """Time one runner on one batch."""
    runner, reference = opened.runner, references[work.tower]
    context = inputs.checkpoint.text.context_length
    if work.length and work.length > context:
        record.leave_out(str(work), f"the context length of this model is {context} tokens")
    batch = batch_of(inputs.checkpoint, work, padded=opened.padded)
    padded = batch_of(inputs.checkpoint, work, padded=True)
    items = opened.prepare(batch)
    turns = Turns(partial(reference.run, padded), partial(runner.run, items))
    seconds = turns.expected_seconds(budget)
    if record.device == "cuda" and device_of(runner.spec) == "cpu" and seconds > _BASELINE_SECONDS:
        record.leave_out(f"{work}, {runner.name}", f"expected to take {seconds:.0f} s")
    benchmark.group = str(work)
    got = benchmark.pedantic(  # type: ignore[no-untyped-call]
        runner.run, args=(items,), setup=turns.setup, rounds=turns.rounds(budget)
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    data = benchmark.stats.stats.data
    cosines = (got * turns.reference_result).sum(axis=1) / np.linalg.norm(got, axis=1)
    length = batch.shape[1] if work.tower == "text" else None
    config = inputs.checkpoint.clip.config
    record.add(
        TowerLatency(
            tower=work.tower,
            batch=work.batch,
            length=work.length,
            length_run=length,
            runner=runner.name,
            runtime_version=runner.runtime_version,
            timing=timing_of(data),
            device_timing=_on_device(runner, items),
            reference_ms=turns.reference_ms,
            ratios=turns.ratios(data),
            cosine=float(cosines.min()),
            gflop=count_flops(config, work.tower, work.batch, length) / 1e9,
            weight_bytes=opened.weight_bytes,
        )
    )


def _on_device(runner: Runner, items: object) -> Timing | None:
    """Time a PyTorch runner on a GPU without the transfers; return None for other runners."""
    if not isinstance(runner, TorchRunner) or runner.device.type == "cpu":
        return None
    assert isinstance(items, np.ndarray)
    return timing_of(timed(runner.launcher(items), runner.device.type, _DEVICE_ROUNDS))
