"""Which runner of a tower is the fastest here, of those that passed the gate?"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import numpy as np

from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Latency, Tower
from serving.errors import BundleError, RunnerError
from serving.runners.base import Batch, Runner
from serving.runners.prefix_tree import open_text_tree
from serving.runners.registry import missing, open_runner
from serving.runners.spec import RUNNERS, runners_of
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


def passed(bundle: Bundle, tower: Tower, *, tree: bool = False) -> list[str]:
    """Runners of `tower`, or of its tree graph, that passed the gate and that are had here."""
    found = {
        name
        for artifact in bundle.manifest.artifacts
        if artifact.tower == tower and (artifact.kind == "tree") == tree
        for name in runners_of(artifact)
        if artifact.passed(name) and missing(name) is None
    }
    return [name for name in RUNNERS if name in found]


def time_runners(bundle: Bundle, tower: Tower, names: Iterable[str]) -> list[Latency]:
    """Milliseconds of each runner, fastest first; one that cannot run here is left out.

    Raises:
        BundleError: none of them can.
    """
    runners = {name: partial(open_runner, bundle, tower, name) for name in names}
    times, errors = _race(runners, _batch(bundle, tower))
    if not times:
        why = "; ".join(map(str, errors.values())) or "the gate let none through"
        raise BundleError(f"{bundle.path}: no runner for the {tower} tower: {why}")
    return [
        Latency(tower=tower, runner=name, batch=BATCH, milliseconds=ms, machine=describe())
        for name, ms in times.items()
    ]


def tree_runner(bundle: Bundle, asked: str, plain: str) -> str | None:
    """Which runner is to embed labels in templates as trees.

    None if it did not pass the gate with the tree graph, or if the bundle has none.

    Args:
        asked: a runner; for `auto` those that passed are timed, here and now, and it is the
            fastest, or None if `plain` is faster.
        plain: the runner of the text tower itself.

    Raises:
        RunnerError, BundleError: `plain` cannot be opened, or a file is not the exported one.
    """
    names = passed(bundle, "text", tree=True)
    if asked != "auto" or not names:
        return asked if asked in names else None
    runners: dict[str, Callable[[], Runner]] = {"": partial(open_runner, bundle, "text", plain)}
    runners |= {name: partial(open_text_tree, bundle, name) for name in names}
    times, errors = _race(runners, _prompts(bundle))
    if "" in errors:
        raise errors[""]
    return next(iter(times)) or None


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
