"""Which runner of a tower is the fastest here, of those that passed the gate?"""

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
"""What is timed: about what dynamic batching makes of a few clients, and a text of usual length."""
_LOOKS, _NEAR = 2, 2.0
"""A runner whose better look takes up to _NEAR times as long as the fastest one's stays open, to be
timed; no fewer than all of these, since a busy machine makes the fastest look like the last."""
_ROUNDS, _FEWEST_ROUNDS, _ENOUGH_S = 7, 3, 2.0
"""Slow runs are as even as quick ones are after many: three rounds, if seven would take long."""
_LONG_S = 0.15
"""A shorter run is of a runner that finds its weights in the caches: it runs untimed before."""


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
    """Time each runner, fastest first; one that cannot run here is left out.

    Raises:
        BundleError: none of them can.
    """
    opened = {str(spec): partial(open_runner, bundle, tower, spec) for spec in runners}
    times, errors = _race(opened, _batch(bundle, tower))
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
    """Return the fastest runner of `tower` on this machine, of those that passed the gate.

    Raises:
        BundleError: none can run here.
    """
    return RunnerSpec.parse(time_runners(bundle, tower, passed(bundle, tower))[0].runner)


def prefix_tree_runner(bundle: Bundle, asked: str, plain: RunnerSpec) -> RunnerSpec | None:
    """Return the runner that is to embed prompts as prefix trees.

    None: it did not pass the gate with the prefix-tree graph, or the bundle has none.

    Args:
        asked: a runner; with `auto`, those that passed are timed, and it is the fastest one, or
            None if `plain` is faster.
        plain: the runner of the text tower itself.

    Raises:
        RunnerError, BundleError: `plain` cannot be opened, or a file is not the exported one.
    """
    found = passed(bundle, "prefix_tree")
    if asked != "auto" or not found:
        return next((spec for spec in found if str(spec) == asked), None)
    runners: dict[str, Callable[[], Runner]] = {"": partial(open_runner, bundle, "text", plain)}
    runners |= {str(spec): partial(open_prefix_tree, bundle, spec) for spec in found}
    times, errors = _race(runners, _prompts(bundle))
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
    """Texts as labels in templates make them: eight beginnings, each with eight endings."""
    ids = np.tile(_batch(bundle, "text"), (BATCH, 1)).astype(np.int32)
    half = ids.shape[1] // 2
    ids[:, half:-1] = np.repeat(ids[:BATCH, half:-1], BATCH, axis=0)
    return ids


def _race(
    runners: Mapping[str, Callable[[], Runner]], batch: Batch
) -> tuple[dict[str, float], dict[str, RunnerError]]:
    """Milliseconds of runners that are not yet entered, fastest first; why others cannot run.

    Each is looked at, and those that come near the fastest are timed in turns: a machine that is
    busy for a second would otherwise decide for as long as the repository is served.
    """
    looks: dict[str, float] = {}
    errors = {}
    near: dict[str, tuple[Runner, ExitStack]] = {}
    with ExitStack() as every:
        for name, opened in runners.items():
            closing = every.enter_context(ExitStack())
            try:
                runner = closing.enter_context(opened())
                runner.run(batch)
                looks[name] = min(_run_s(runner, batch) for _ in range(_LOOKS))
            except RunnerError as error:
                errors[name] = error
                closing.close()
                continue
            near[name] = runner, closing
            for far in [one for one in near if looks[one] > _NEAR * min(looks.values())]:
                near.pop(far)[1].close()
        times = _in_turns({name: runner for name, (runner, _) in near.items()}, batch)
    seconds = looks | times
    # A look may have been in a better moment than the turns: only who took turns can be first.
    first = min(times, key=times.__getitem__, default="")
    ranked = sorted(seconds, key=lambda name: (name != first, seconds[name]))
    return {name: seconds[name] * 1e3 for name in ranked}, errors


def _in_turns(runners: Mapping[str, Runner], batch: Batch) -> dict[str, float]:
    """Median seconds."""
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
