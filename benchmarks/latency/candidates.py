"""Batches and runners that the latency benchmark measures on each device."""

import functools
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
from export.pipeline import tower_of
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import Tower
from serving.errors import BundleError, RunnerError
from serving.runners.base import Batch, Runner
from serving.runners.registry import open_runner
from serving.runners.spec import RUNNERS, RunnerSpec, device_of, graph_of, runtime_of
from serving.util.extras import require
from serving.util.results import Device, Matrix

REFERENCE: dict[Device, str] = {"cpu": "eager:fp32", "cuda": "eager-cuda:fp32"}
"""Reference runner that every other runner is timed against, in turns."""
PEERS = ("transformers:fp32", "transformers-longest:fp32", "onnxruntime-plain:fp32")
_TORCH: dict[Device, tuple[str, ...]] = {
    "cpu": ("torchscript:fp32", "compiled:fp32"),
    "cuda": (
        *("eager-cuda:tf32", "eager-cuda:fp16", "eager-cuda:bf16"),
        *("torchscript-cuda:fp32", "compiled-cuda:fp16", "compiled-cuda:bf16"),
    ),
}


NAMES: dict[Device, tuple[str, ...]] = {
    "cpu": (
        *(REFERENCE["cpu"], *_TORCH["cpu"], *PEERS),
        *(str(spec) for spec in RUNNERS if device_of(spec) == "cpu"),
    ),
    "cuda": (
        *(REFERENCE["cuda"], *_TORCH["cuda"]),
        *(str(spec) for spec in RUNNERS if device_of(spec) == "cuda"),
        *("eager:fp32", "openvino:int8"),  # CPU baselines
    ),
}
"""Runners to measure on each device; unavailable ones are left out with a reason."""

_FULL_ONLY = ("compiled:*", "onnxruntime:fp16", "onnxruntime:int8-*", "openvino:fp16")
"""Runners of the full matrix only: they compile for minutes, or run graphs for GPUs on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Batch size of one tower and, for texts, their length in tokens."""

    tower: Tower
    batch: int
    length: int | None = None

    def __str__(self) -> str:
        return f"{self.tower} {self.batch}" + (f" x {self.length} tokens" if self.length else "")


def _works(
    images: tuple[int, ...], texts: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[Work, ...]:
    return (
        *(Work(tower="image", batch=batch) for batch in images),
        *(Work(tower="text", batch=batch, length=n) for n in lengths for batch in texts),
    )


_TO_64, _TO_256 = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32, 64, 128, 256)
WORKS: dict[tuple[Device, Matrix], tuple[Work, ...]] = {
    ("cpu", "short"): _works((1, 4), (1, 8), (16,)),
    ("cpu", "full"): _works(_TO_64, _TO_64, (8, 16, 32, 77)),
    ("cuda", "short"): _works((1, 8, 32, 128), (1, 32, 256), (16, 77)),
    ("cuda", "full"): _works(_TO_256, _TO_256, (16, 77)),
}


def wanted(name: str, *, full: bool, patterns: tuple[str, ...]) -> bool:
    """Return whether runner `name` is selected."""
    if patterns:
        return any(fnmatch(name, pattern) for pattern in patterns)
    return full or not any(fnmatch(name, pattern) for pattern in _FULL_ONLY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Resources that runners are created from."""

    bundle: Bundle | None
    """None: measure a checkpoint that was not exported, with PyTorch's runners and peers only."""
    checkpoint: Checkpoint
    peer: Callable[[], Peer]
    """Returns the transformers model; the first call loads it."""
    saved: Path
    """Directory with the checkpoint in Hugging Face's layout."""
    scratch: Path
    """Directory for graphs that the benchmark exports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Runner whose context is not entered yet, with the preparation of its inputs."""

    tower: Tower
    runner: Runner
    prepare: Callable[[Batch], Any] = field(default=lambda batch: batch)
    """Converts a batch to the input of the runner; not timed."""
    padded: bool = False
    """True: texts are padded to the context length, as in the documentation of OpenAI and Hugging
    Face. False: texts have the length of the work."""
    weight_bytes: int = 0
    """Bytes of weights that every run reads, which excludes the token embedding table."""


def candidate(inputs: Inputs, tower: Tower, name: str) -> Candidate:
    """Return the runner called `name`.

    Raises:
        ClipDeployError: the runner is not available here; the message says why.
    """
    spec = RunnerSpec.parse(name)
    module = tower_of(inputs.checkpoint, tower)
    weights = {"fp16": 2, "bf16": 2}.get(spec.precision, 4) * _weights(module)
    if name in PEERS:
        return _peer(inputs, tower, spec, weights)
    device, kind = device_of(spec), spec.runtime.removesuffix("-cuda")
    if kind in ("eager", "compiled"):
        made = EagerRunner if kind == "eager" else CompiledRunner
        runner = made(module, device, spec.precision)  # type: ignore[arg-type]
        padded = name in REFERENCE.values()
        return Candidate(tower=tower, runner=runner, padded=padded, weight_bytes=weights)
    if kind == "torchscript":
        path = inputs.scratch / f"{tower}.torchscript.pt"
        if not path.exists():
            require("TorchScript", "export", "onnx")
            from export.graphs.torchscript import export_torchscript

            export_torchscript(module, path)
        traced = TorchScriptRunner(path, device)
        return Candidate(tower=tower, runner=traced, weight_bytes=weights)
    if inputs.bundle is None:
        raise BundleError(
            f"{name} runs graphs of a bundle, and a checkpoint is measured",
            advice="export the checkpoint and measure the bundle",
        )
    library, graph = runtime_of(spec).library, graph_of(spec)
    artifact = inputs.bundle.artifact(tower, graph)
    if library is not None:
        artifact = inputs.bundle.plans(tower, graph, library)[0]
    every = sum(file.bytes for file in artifact.files)
    table = _table(module) * (2 if "fp16" in graph else 4)
    return Candidate(
        tower=tower,
        runner=open_runner(inputs.bundle, tower, spec),
        weight_bytes=max(0, every - table),
    )


def _peer(inputs: Inputs, tower: Tower, spec: RunnerSpec, weights: int) -> Candidate:
    longest = spec.runtime == "transformers-longest"
    if longest and tower == "image":
        raise RunnerError(
            "applies to texts only, because images are not padded; see transformers:fp32"
        )
    peer = inputs.peer()
    runner: PeerRunner = TransformersRunner(peer, tower)
    if spec.runtime == "onnxruntime-plain":
        runner = PlainOnnxRunner(peer, tower, inputs.scratch)
    runner.spec = spec
    return Candidate(
        tower=tower,
        runner=runner,
        prepare=functools.partial(runner.prepared, spec=inputs.checkpoint.image),
        padded=not longest,
        weight_bytes=weights,
    )


def _weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters()) - _table(module)


def _table(module: torch.nn.Module) -> int:
    """Return the number of elements in embedding tables, of which a run reads only a few rows."""
    tables = [m for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    return sum(table.weight.numel() for table in tables)


def batch_of(checkpoint: Checkpoint, work: Work, *, padded: bool = False) -> Batch:
    """Return a batch for `work`; its texts have `work.length` tokens.

    Args:
        checkpoint: checkpoint whose shapes and vocabulary apply.
        work: tower, batch size and length.
        padded: whether to pad texts to the context length.
    """
    if work.tower == "image":
        return probe_images(checkpoint.image, work.batch, seed=1)
    spec = checkpoint.text
    most = spec.context_length
    ids = probe_texts(spec, work.batch, most if padded else work.length or most, seed=1)
    last = (work.length or most) - 1
    ids[:, 1:last] = 320 % spec.vocab_size
    ids[:, last], ids[:, last + 1 :] = spec.end_id, spec.pad_id
    return ids
