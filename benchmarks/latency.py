"""Every runner of a bundle through the same loop, against eager float32 in the same run.

The machine drifts, so runners take turns: each round gives every one of them one run that is not
timed, for what the runner before it left behind (its weights in the caches, its threads spinning),
and one that is. A runner's number is the median of its rounds.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from export.build import checkpoint_of, tower_of
from export.calibration import probe_images, probe_texts
from export.torch_runners import CompiledRunner, EagerRunner, TorchScriptRunner
from serving.bundle import Bundle, Tower
from serving.commands import Steps
from serving.errors import RunnerError
from serving.runners.base import Batch, Runner, missing, open_runner, runners_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is timed: a tower, a batch, and for texts their length in tokens."""

    tower: Tower
    batch: int
    length: int | None = None

    def __str__(self) -> str:
        return f"{self.tower} {self.batch}" + (f" x {self.length} tokens" if self.length else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """A runner's median on some work."""

    work: str
    runner: str
    milliseconds: float
    speedup: float
    """Over eager:fp32 on the same items; texts of eager are padded to the context length, as
    OpenAI's and Hugging Face's tokenizers pad them."""
    rounds: int


def latency(
    bundle: Bundle,
    works: Sequence[Work],
    rounds: int,
    progress: Steps,
    *,
    compiled: bool = False,
) -> list[Timing]:
    """Time all runners that this environment has and whose artifacts are in the bundle."""
    checkpoint = checkpoint_of(bundle)
    timings = []
    for work in works:
        with ExitStack() as stack:
            runners: list[Runner] = []
            tower = tower_of(checkpoint, work.tower)
            candidates: list[Runner] = [EagerRunner(tower)]
            if compiled:
                candidates.append(CompiledRunner(tower))
            for candidate in candidates + artifact_runners(bundle, work.tower):
                try:
                    runners.append(stack.enter_context(candidate))
                except RunnerError as error:
                    progress(f"without {candidate.name}: {error}", 0, 0)
            timings += _time(bundle, work, runners, rounds, progress)
    return timings


def artifact_runners(bundle: Bundle, tower: Tower) -> list[Runner]:
    """Runners of everything the bundle holds of `tower`, not yet entered."""
    found: list[Runner] = []
    for artifact in bundle.manifest.artifacts:
        if artifact.tower != tower:
            continue
        if artifact.kind == "torchscript":
            found.append(TorchScriptRunner(bundle.verified(artifact)))
            continue
        names = [name for name in runners_of(artifact) if missing(name) is None]
        found += [open_runner(bundle, tower, name) for name in names]
    return found


def batch_of(bundle: Bundle, work: Work, length: int | None = None) -> Batch:
    """A batch for `work`; texts end where `work.length` says, and are padded to `length`."""
    if work.tower == "image":
        return probe_images(bundle.manifest.image, work.batch, seed=1)
    spec = bundle.manifest.text
    ids = probe_texts(spec, work.batch, length or work.length or spec.context_length, seed=1)
    last = (work.length or spec.context_length) - 1
    ids[:, 1:last] = 320 % spec.vocab_size
    ids[:, last], ids[:, last + 1 :] = spec.end_id, spec.pad_id
    return ids


def _time(
    bundle: Bundle,
    work: Work,
    runners: list[Runner],
    rounds: int,
    progress: Steps,
) -> list[Timing]:
    full = batch_of(bundle, work, bundle.manifest.text.context_length)
    cut = batch_of(bundle, work)
    batches = {runner.name: full if runner.name == "eager:fp32" else cut for runner in runners}
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for turn in range(-1, rounds):  # one turn to warm up
        for runner in runners:
            runner.run(batches[runner.name])
            start = time.perf_counter()
            runner.run(batches[runner.name])
            if turn >= 0:
                seconds[runner.name].append(time.perf_counter() - start)
        progress(str(work), max(turn + 1, 0), rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        Timing(
            work=str(work),
            runner=name,
            milliseconds=median * 1e3,
            speedup=medians["eager:fp32"] / median,
            rounds=rounds,
        )
        for name, median in sorted(medians.items(), key=lambda item: item[1])
    ]
