"""What `test_latency.py` times: works, and every runner that can do them.

The machine drifts, so a runner takes turns with the reference, PyTorch's eager float32 tower. In
its turn either runs untimed before it is timed, for what the other left behind, its weights in the
caches and its threads spinning; those of plain ONNX Runtime spin so long that the reference waits
for them. What can be compared between runs and machines is the ratio of the two in adjacent turns,
its median over the turns.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency.peers import Peer, PeerRunner, PlainOnnxRunner, TransformersRunner
from export.checkpoints.load import Checkpoint
from export.gate.datasets import probe_images, probe_texts
from export.gate.torch_runners import CompiledRunner, EagerRunner, TorchScriptRunner
from export.graphs.torchscript import export_torchscript
from export.pipeline import tower_of
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Tower
from serving.errors import RunnerError
from serving.runners.base import Batch, Runner
from serving.runners.registry import open_runner
from serving.runners.spec import RUNNERS, graph_of, library_of

REFERENCE = "eager:fp32"
PEERS = ("transformers:fp32", "transformers-longest:fp32", "onnxruntime-plain:fp32")
TORCH = ("torchscript:fp32", "compiled:fp32")
CUDA = ("eager-cuda:fp32", "eager-cuda:fp16", "eager-cuda:bf16", "compiled-cuda:fp16")
NAMES = (REFERENCE, *TORCH, *CUDA, *PEERS, *RUNNERS)
"""Everything that may be timed; what is not to be had is skipped with the reason."""

_LONG_ONLY = ("compiled*", "onnxruntime:fp16", "onnxruntime:int8-*", "openvino:fp16")
"""Left to the full matrix: minutes of compilation, and graphs for GPUs on a CPU."""

_TURN_SECONDS, _TURN_RUNS = 0.15, 30
"""A turn lasts about so long and has so many runs at most, and one more; the first half is not
timed. Of runs that take longer it has one. (An int8 text tower after eager float32: its quartiles
28 to 47 ms after one untimed run, 27 to 30 after five.)"""
_REST_SECONDS = 0.08
"""Before the reference. Threads of plain ONNX Runtime spin for 50 ms after a run, on CPUs that the
reference wants: eager float32 took up to 267 ms for a picture then, and 100 to 160 otherwise."""
_SLOW_SECONDS = 1.5
"""Two turns that take longer are repeated less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is timed: a tower, a batch, and for texts their length in tokens."""

    tower: Tower
    batch: int
    length: int | None = None

    def __str__(self) -> str:
        return f"{self.tower} {self.batch}" + (f" x {self.length} tokens" if self.length else "")


_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_LENGTHS = (8, 16, 32, 77)

SHORT = (
    *(Work(tower="image", batch=batch) for batch in (1, 4)),
    *(Work(tower="text", batch=batch, length=16) for batch in (1, 8)),
)
FULL = (
    *(Work(tower="image", batch=batch) for batch in _BATCHES),
    *(Work(tower="text", batch=batch, length=n) for n in _LENGTHS for batch in _BATCHES),
)


def wanted(name: str, *, full: bool, patterns: tuple[str, ...]) -> bool:
    """Whether runner `name` is to be timed."""
    if patterns:
        return any(fnmatch(name, pattern) for pattern in patterns)
    return full or not any(fnmatch(name, pattern) for pattern in _LONG_ONLY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What runners are made of."""

    bundle: Bundle
    checkpoint: Checkpoint
    peer: Callable[[], Peer]
    """Loads transformers' model when it is first called."""
    folder: Path
    """The checkpoint in Hugging Face's layout."""
    scratch: Path
    """For graphs that are made on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A runner, not yet entered, and how a batch is handed to it."""

    tower: Tower
    runner: Runner
    prepare: Callable[[Batch], Any] = field(default=lambda batch: batch)
    """Outside the timing."""
    padded: bool = False
    """Whether its texts are padded to the context length, as OpenAI's and Hugging Face's
    documentation pad them; all others are cut to the length of the work."""
    weight_bytes: int = 0
    """Read from memory by every run: without the table of token embeddings."""


def candidate(inputs: Inputs, tower: Tower, name: str) -> Candidate:
    """The runner called `name`.

    Raises:
        RunnerError, BundleError: it is not to be had here; the message says why.
    """
    runtime, _, precision = name.partition(":")
    module = tower_of(inputs.checkpoint, tower)
    weights = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}.get(precision, 4) * _weights(module)
    if name in PEERS:
        return _peer(inputs, tower, name, weights)
    kind, _, device = runtime.partition("-")
    device = device or "cpu"
    if kind in ("eager", "compiled"):
        runner = (EagerRunner if kind == "eager" else CompiledRunner)(module, device, precision)  # type: ignore[arg-type]
        return Candidate(tower=tower, runner=runner, padded=name == REFERENCE, weight_bytes=weights)
    if kind == "torchscript":
        path = inputs.scratch / f"{tower}.torchscript.pt"
        if not path.exists():
            export_torchscript(module, path)
        return Candidate(tower=tower, runner=TorchScriptRunner(path), weight_bytes=weights)
    artifact = inputs.bundle.artifact(tower, graph_of(name))
    if library_of(name) is not None:
        artifact = inputs.bundle.plans(tower, graph_of(name), library_of(name))[0]  # type: ignore[arg-type]
    every = sum(file.bytes for file in artifact.files)
    table = _table(module) * (2 if "fp16" in graph_of(name) else 4)
    return Candidate(
        tower=tower,
        runner=open_runner(inputs.bundle, tower, name),
        weight_bytes=max(0, every - table),
    )


def _peer(inputs: Inputs, tower: Tower, name: str, weights: int) -> Candidate:
    if name == "transformers-longest:fp32" and tower == "image":
        raise RunnerError("pictures are not padded: see transformers:fp32")
    peer, spec = inputs.peer(), inputs.bundle.manifest.image
    runner: PeerRunner = TransformersRunner(peer, tower)
    if name.startswith("onnxruntime"):
        runner = PlainOnnxRunner(peer, tower, inputs.scratch)
    runner.name = name
    return Candidate(
        tower=tower,
        runner=runner,
        prepare=lambda batch: runner.prepared(batch, spec),
        padded="longest" not in name,
        weight_bytes=weights,
    )


def _weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters()) - _table(module)


def _table(module: torch.nn.Module) -> int:
    """Numbers in tables that a run reads a few rows of."""
    tables = [m for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    return sum(table.weight.numel() for table in tables)


def batch_of(bundle: Bundle, work: Work, *, padded: bool = False) -> Batch:
    """A batch for `work`; texts end where `work.length` says, `padded` to the context length."""
    if work.tower == "image":
        return probe_images(bundle.manifest.image, work.batch, seed=1)
    spec = bundle.manifest.text
    most = spec.context_length
    ids = probe_texts(spec, work.batch, most if padded else work.length or most, seed=1)
    last = (work.length or most) - 1
    ids[:, 1:last] = 320 % spec.vocab_size
    ids[:, last], ids[:, last + 1 :] = spec.end_id, spec.pad_id
    return ids


class Turns:
    """Turns of a call and of a reference; see this module's docstring.

    `setup` is what pytest-benchmark's pedantic mode calls before each round. A round is one run.
    """

    def __init__(self, reference: Callable[[], Any], call: Callable[[], Any]) -> None:
        self._reference, self._call = reference, call
        self.reference_result: Any = None
        self.reference_seconds: list[list[float]] = []
        """Of every turn."""
        seconds = self._refer()
        self._reference_untimed, self._reference_timed = _turn_of(seconds)
        _seconds(call)  # the first: allocation, compilation
        more = _seconds(call)
        self._untimed, self._timed = _turn_of(more)
        self._both = _REST_SECONDS + sum(_turn_of(seconds)) * seconds + sum(_turn_of(more)) * more
        self._rounds = 0

    def rounds(self, budget: float) -> int:
        """Of as many turns as fit into `budget` seconds; 15 at most, 5 at least, of slow ones 3."""
        least = 3 if self._both > _SLOW_SECONDS else 5
        return min(15, max(least, int(budget / self._both))) * self._timed

    def _refer(self) -> float:
        start = time.perf_counter()
        self.reference_result = self._reference()
        return time.perf_counter() - start

    def setup(self) -> None:
        """Where a turn begins, the reference's own, and the untimed runs."""
        if self._rounds % self._timed == 0:
            time.sleep(_REST_SECONDS)
            for _ in range(self._reference_untimed):
                self._reference()
            self.reference_seconds.append([self._refer() for _ in range(self._reference_timed)])
            for _ in range(self._untimed):
                self._call()
        self._rounds += 1


def _turn_of(seconds: float) -> tuple[int, int]:
    """Untimed and timed runs of a turn of something that takes so long."""
    settle = math.ceil(_TURN_SECONDS / seconds)
    runs = 1 if settle == 1 else min(settle, _TURN_RUNS) + 1
    return runs // 2, runs - runs // 2


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
