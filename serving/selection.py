"""Which runner of a tower is the fastest here, of those that passed the gate?"""

import statistics
import time
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from serving.bundle import Bundle, Latency, Tower
from serving.errors import BundleError, RunnerError
from serving.machine import describe
from serving.runners.base import RUNNERS, Batch, Runner, missing, open_runner, runners_of
from serving.runners.text_tree import open_text_tree

BATCH, LENGTH = 8, 16
"""What is timed: about what dynamic batching makes of a few clients, and a text of usual length."""
_WARM_UPS, _RUNS = 2, 7
_FEWEST_RUNS, _ENOUGH_S = 3, 1.0
"""Slow runs are as even as quick ones are after many: three, if seven would take seconds."""


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
    """Median milliseconds of each runner, fastest first; one that cannot run here is left out.

    Raises:
        BundleError: none of them can.
    """
    batch, reasons = _batch(bundle, tower), []
    timed = []
    for name in names:
        try:
            milliseconds = _opened_ms(open_runner(bundle, tower, name), batch)
        except RunnerError as error:
            reasons.append(str(error))
            continue
        timed.append(
            Latency(
                tower=tower,
                runner=name,
                batch=BATCH,
                milliseconds=milliseconds,
                machine=describe(),
            )
        )
    if not timed:
        why = "; ".join(reasons) or "the gate let none through"
        raise BundleError(f"{bundle.path}: no runner for the {tower} tower: {why}")
    return sorted(timed, key=lambda latency: latency.milliseconds)


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
    batch = _prompts(bundle)
    times = {_opened_ms(open_runner(bundle, "text", plain), batch): ""}
    for name in names:
        with suppress(RunnerError):
            times[_opened_ms(open_text_tree(bundle, name), batch)] = name
    return times[min(times)] or None


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


def _opened_ms(opened: Runner, batch: Batch) -> float:
    """Median milliseconds of a runner that is not yet entered."""
    with opened as runner:
        return _median_ms(runner, batch)


def _median_ms(runner: Runner, batch: Batch) -> float:
    for _ in range(_WARM_UPS):
        runner.run(batch)
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        runner.run(batch)
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= _FEWEST_RUNS and sum(seconds) > _ENOUGH_S:
            break
    return statistics.median(seconds) * 1e3
