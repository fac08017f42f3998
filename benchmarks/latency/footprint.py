"""Startup time and peak memory of a process that uses a runner.

`python -m benchmarks.latency.footprint BUNDLE CHECKPOINT SCRATCH RUNNER` opens both towers, embeds
32 images and 32 texts of 16 tokens, and prints a JSON document. It runs in its own process, so that
earlier imports and allocations are not counted.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS, Tower
from serving.runners.base import Batch
from serving.runners.registry import open_runner
from serving.runners.spec import RUNNERS, RunnerSpec
from serving.util.typed_json import json_text

BATCH, LENGTH = 32, 16

Run = Callable[[Batch], Any]


def measure(bundle: Bundle, checkpoint: Path, scratch: Path, name: str) -> dict[str, float]:
    """Return the load time, the time of the first run, and the memory of this process.

    Args:
        bundle: bundle, for runners of graphs.
        checkpoint: the same weights in Hugging Face's layout, for runners based on PyTorch.
        scratch: directory of the graphs that `benchmarks.latency.candidates` exported.
        name: name of the runner.
    """
    manifest, before = bundle.manifest, _memory("VmRSS")
    batches: dict[Tower, Batch] = {
        "image": np.zeros((BATCH, 3, manifest.image.size, manifest.image.size), np.uint8),
        "text": np.full((BATCH, LENGTH), manifest.text.end_id, np.int32),
    }
    start = time.perf_counter()
    with ExitStack() as stack:
        spec = RunnerSpec.parse(name)
        if spec in RUNNERS:
            runs: dict[Tower, Run] = {
                tower: stack.enter_context(open_runner(bundle, tower, spec)).run for tower in TOWERS
            }
        elif spec.runtime == "onnxruntime-plain":
            runs = {tower: _plain(bundle, scratch, tower) for tower in TOWERS}
        elif spec.runtime == "transformers":
            runs = _transformers(bundle, checkpoint)
        else:
            runs = _torch(checkpoint, scratch, name, stack)
        load_s, loaded = time.perf_counter() - start, _memory("VmRSS")
        start = time.perf_counter()
        for tower in TOWERS:
            runs[tower](batches[tower])
        first_s = time.perf_counter() - start
    return {
        "load_s": load_s,
        "first_s": first_s,
        "before_bytes": before,
        "loaded_bytes": loaded,
        "peak_bytes": _memory("VmHWM"),
    }


def _plain(bundle: Bundle, scratch: Path, tower: Tower) -> Run:
    import onnxruntime

    from serving.util.machine import cpu_count

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    path = scratch / f"{tower}.plain.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if tower == "image":
        return lambda batch: session.run(None, {"batch": batch.astype(np.float32)})
    spec = bundle.manifest.text
    padded = np.full((BATCH, spec.context_length), spec.pad_id, np.int64)
    return lambda _: session.run(None, {"batch": padded})


def _transformers(bundle: Bundle, checkpoint: Path) -> dict[Tower, Run]:
    from benchmarks.latency.peers import Peer, TransformersRunner

    peer, spec = Peer(checkpoint), bundle.manifest.image
    runners: dict[Tower, TransformersRunner] = {t: TransformersRunner(peer, t) for t in TOWERS}

    def run(tower: Tower, batch: Batch) -> Any:
        with runners[tower] as runner:
            return runner.run(runner.prepared(batch, spec))

    return {"image": lambda batch: run("image", batch), "text": lambda batch: run("text", batch)}


def _torch(checkpoint: Path, scratch: Path, name: str, stack: ExitStack) -> dict[Tower, Run]:
    from export.gate.torch_runners import EagerRunner, TorchScriptRunner

    if RunnerSpec.parse(name).runtime == "torchscript":
        traced = {t: TorchScriptRunner(scratch / f"{t}.torchscript.pt") for t in TOWERS}
        return {tower: stack.enter_context(traced[tower]).run for tower in TOWERS}
    from export.checkpoints.load import load_checkpoint

    clip = load_checkpoint(str(checkpoint)).clip
    towers = {"image": EagerRunner(clip.image), "text": EagerRunner(clip.text)}
    return {tower: stack.enter_context(towers[tower]).run for tower in TOWERS}


def _memory(field: str) -> float:
    """Return a memory field of this process in bytes.

    `ru_maxrss` is not used, because it starts with the memory of the parent at the fork.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return float(fields[field].split()[0]) * 1024


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:4]]
    print(json_text(measure(Bundle.open(paths[0]), paths[1], paths[2], sys.argv[4])))
