"""PyTorch behind the runner interface: eager (the reference), compiled, and TorchScript."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serving.machine import cpu_count
from serving.runners.base import Batch, Embeddings, LoadedRunner


class TorchRunner(LoadedRunner):
    """A callable on tensors, float32, on the CPU with explicit threads."""

    runtime_version = f"torch {torch.__version__}"

    def _infer(self, batch: Batch) -> Embeddings:
        torch.set_num_threads(cpu_count())
        with torch.inference_mode():
            output: Embeddings = self._loaded(torch.from_numpy(batch)).numpy()
        return output


class EagerRunner(TorchRunner):
    """A tower as PyTorch runs it: what everything else is compared with."""

    name = "eager:fp32"

    def __init__(self, tower: nn.Module) -> None:
        self._tower = tower

    def _load(self) -> nn.Module:
        return self._tower.eval()


class CompiledRunner(EagerRunner):
    """A tower through `torch.compile`; its first run compiles, and needs a C++ compiler."""

    name = "compiled:fp32"

    def _load(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it imports uses torch.jit, which is deprecated
            return torch.compile(super()._load(), dynamic=True)


class TorchScriptRunner(TorchRunner):
    """A file that `export.to_torchscript` wrote."""

    name = "torchscript:fp32"

    def __init__(self, path: Path) -> None:
        self._path = path

    def _load(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit's own deprecation
            return torch.jit.load(self._path, map_location="cpu")  # type: ignore[no-untyped-call]
