"""Latency of each runner on each batch, in turns with eager float32: `make bench`."""

from functools import partial

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.latency.candidates import Candidate, Inputs, Turns, Work, batch_of
from benchmarks.machine.limits import count_flops
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Tower
from serving.runners.base import Runner


def test_latency(
    benchmark: BenchmarkFixture,
    bundle: Bundle,
    inputs: Inputs,
    references: dict[Tower, Runner],
    opened: Candidate,
    work: Work,
    budget: float,
) -> None:
    """One runner on one batch."""
    context = bundle.manifest.text.context_length
    if work.length and work.length > context:
        pytest.skip(f"texts of {work.length} tokens: this model takes {context}")
    runner, reference = opened.runner, references[work.tower]
    batch = batch_of(bundle, work, padded=opened.padded)
    items, padded = opened.prepare(batch), batch_of(bundle, work, padded=True)
    turns = Turns(partial(reference.run, padded), partial(runner.run, items))
    rounds = turns.rounds(budget)
    length = batch.shape[1] if work.tower == "text" else None
    benchmark.group = str(work)
    got = benchmark.pedantic(runner.run, args=(items,), setup=turns.setup, rounds=rounds)  # type: ignore[no-untyped-call]
    cosines = (got * turns.reference_result).sum(axis=1) / np.linalg.norm(got, axis=1)
    benchmark.extra_info.update(
        kind="tower",
        tower=work.tower,
        batch=work.batch,
        length=work.length,
        length_run=length,
        runner=runner.name,
        runtime_version=runner.runtime_version,
        cosine=float(cosines.min()),
        gflop=count_flops(inputs.checkpoint.clip.config, work.tower, work.batch, length) / 1e9,
        weight_bytes=opened.weight_bytes,
        reference_seconds=turns.reference_seconds,
    )
