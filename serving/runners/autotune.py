"""Autotune: time the runners of a tower that passed the parity gate, and select the fastest."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import numpy as np

from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Graph, Latency, Tower
from serving.errors import BundleError, RunnerError
from serving.runners.base import Batch, Runner
from serving.runners.prefix_tree import open_prefix_tree
from serving.runners.registry import missing, open_runner
from serving.runners.spec import RUNNERS, RunnerSpec, runners_of
from serving.util.machine import describe

BATCH, LENGTH = 8, 16
"""Size of the timed batch, which is about what dynamic batching reaches with a few
clients, and length of its texts in tokens, the usual length of a text."""
_PROBES, _NEAR = 2, 2.0
"""Each runner is probed `_PROBES` times. Runners within `_NEAR` times of the fastest probe advance
to the timed rounds, because the fastest probe on a busy machine may not be of the fastest
runner."""
_ROUNDS, _FEWEST_ROUNDS, _ENOUGH_S = 7, 3, 2.0
"""Maximum and minimum number of timed rounds, and a duration in seconds. Once the timed runs have
taken that long, no rounds beyond the minimum are run, because the times of slow runners vary
little."""
_LONG_S = 0.15
"""A run that takes at most this long, in seconds, is repeated, and only the repetition counts. The
weights of such a fast runner fit into the CPU caches, but the previous run, of another runner, may
have evicted them."""


def passed(bundle: Bundle, graph: Graph) -> list[RunnerSpec]:
    """Return the runners of a graph that passed the parity gate and are available here."""
    return [spec for spec in _passed(bundle, graph) if missing(spec) is None]


def _passed(bundle: Bundle, graph: Graph) -> list[RunnerSpec]:
    """Return the runners of a graph that passed the parity gate, available here or not."""
    found = {
        spec
        for artifact in bundle.manifest.artifacts
        if artifact.graph == graph
        for spec in runners_of(artifact)
        if artifact.passed(spec)
    }
    return [spec for spec in RUNNERS if spec in found]


def time_runners(bundle: Bundle, tower: Tower, runners: Iterable[RunnerSpec]) -> list[Latency]:
    """Time each runner of `tower`, fastest first. Runners that cannot run here are left out.

    Raises:
        BundleError: none of the runners can run here.
    """
    opened = {str(spec): partial(open_runner, bundle, tower, spec) for spec in runners}
    times, errors = _ranked(opened, _batch(bundle, tower))
    if not times:
        absent = filter(None, map(missing, _passed(bundle, tower)))
        reasons = dict.fromkeys(map(str, (*errors.values(), *absent)))
        why = "; ".join(reasons) or "none passed the parity gate"
        raise BundleError(f"{bundle.path}: no runner for the {tower} tower: {why}")
    return [
        Latency(tower=tower, runner=name, batch=BATCH, milliseconds=ms, machine=describe())
        for name, ms in times.items()
    ]


def fastest(bundle: Bundle, tower: Tower) -> RunnerSpec:
    """Return the fastest runner of `tower` on this machine that passed the parity gate.

    Raises:
        BundleError: no runner can run here.
    """
    return RunnerSpec.parse(time_runners(bundle, tower, passed(bundle, tower))[0].runner)


def prefix_tree_runner(bundle: Bundle, asked: str, plain: RunnerSpec) -> RunnerSpec | None:
    """Return the runner that embeds prompts as prefix trees; None if there is none.

    Args:
        bundle: bundle with or without a prefix-tree graph.
        asked: name of a runner, or `auto`. A named runner is returned if it passed the parity gate
            with the prefix-tree graph. With `auto`, all runners that passed are timed against
            `plain`, and the fastest is returned, or None if that is `plain`.
        plain: runner of the plain text graph.

    Raises:
        RunnerError, BundleError: `plain` cannot be opened, or a file differs from the exported one.
    """
    found = passed(bundle, "prefix_tree")
    if asked != "auto" or not found:
        return next((spec for spec in found if str(spec) == asked), None)
    runners: dict[str, Callable[[], Runner]] = {"": partial(open_runner, bundle, "text", plain)}
    runners |= {str(spec): partial(open_prefix_tree, bundle, spec) for spec in found}
    times, errors = _ranked(runners, _prompts(bundle))
    if "" in errors:
        raise errors[""]
    first = next(iter(times))
    return RunnerSpec.parse(first) if first else None


def _batch(bundle: Bundle, tower: Tower) -> Batch:
    rng = np.random.default_rng(0)
    if tower == "image":
        size = bundle.manifest.image.size
        return rng.integers(0, 256, (BATCH, 3, size, size), np.uint8)
    text = bundle.manifest.text
    length = next(bucket for bucket in text.buckets if bucket >= min(LENGTH, text.context_length))
    ids = rng.integers(0, text.vocab_size - 2, (BATCH, length), np.int32)
    ids[:, 0], ids[:, -1] = text.start_id, text.end_id
    return ids


def _prompts(bundle: Bundle) -> Batch:
    """Return token ids like those of a label set: eight prefixes, each with eight endings."""
    ids = np.tile(_batch(bundle, "text"), (BATCH, 1)).astype(np.int32)
    half = ids.shape[1] // 2
    ids[:, half:-1] = np.repeat(ids[:BATCH, half:-1], BATCH, axis=0)
    return ids


def _ranked(
    runners: Mapping[str, Callable[[], Runner]], batch: Batch
) -> tuple[dict[str, float], dict[str, RunnerError]]:
    """Return the milliseconds of each runner, fastest first, and the errors of those that failed.

    All runners are probed, and those near the fastest are then timed in interleaved rounds.
    Otherwise, one busy second of the machine could change the selection, which stays in effect for
    as long as the model repository is served.

    Args:
        runners: name -> function that returns the runner, not yet entered.
        batch: the batch to time.
    """
    probes: dict[str, float] = {}
    errors = {}
    near: dict[str, tuple[Runner, ExitStack]] = {}
    with ExitStack() as every:
        for name, opened in runners.items():
            closing = every.enter_context(ExitStack())
            try:
                runner = closing.enter_context(opened())
                runner.run(batch)
                probes[name] = min(_run_s(runner, batch) for _ in range(_PROBES))
            except RunnerError as error:
                errors[name] = error
                closing.close()
                continue
            near[name] = runner, closing
            for far in [one for one in near if probes[one] > _NEAR * min(probes.values())]:
                near.pop(far)[1].close()
        times = _interleaved({name: runner for name, (runner, _) in near.items()}, batch)
    seconds = probes | times
    # A probe may have run at a quieter moment than the rounds, so only a runner that was timed in
    # the rounds can be the fastest.
    first = min(times, key=times.__getitem__, default="")
    ranked = sorted(seconds, key=lambda name: (name != first, seconds[name]))
    return {name: seconds[name] * 1e3 for name in ranked}, errors


def _interleaved(runners: Mapping[str, Runner], batch: Batch) -> dict[str, float]:
    """Return the median seconds of each runner over interleaved rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for place in range(_ROUNDS):
        for name, runner in runners.items():
            seconds[name].append(_run_s(runner, batch))
        if place + 1 >= _FEWEST_ROUNDS and sum(map(sum, seconds.values())) > _ENOUGH_S:
            break
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _run_s(runner: Runner, batch: Batch) -> float:
    start = time.perf_counter()
    runner.run(batch)
    if (seconds := time.perf_counter() - start) > _LONG_S:
        return seconds
    start = time.perf_counter()
    runner.run(batch)
    return time.perf_counter() - start
