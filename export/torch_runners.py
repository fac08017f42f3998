"""PyTorch behind the runner interface: eager (the reference), compiled, and TorchScript."""

import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import nn

from serving.errors import RunnerError
from serving.machine import cpu_count
from serving.runners.base import Batch, Embeddings


class TorchRunner:
    """A callable on tensors, float32, on the CPU with explicit threads."""

    name: ClassVar[str]
    runtime_version = f"torch {torch.__version__}"

    def __init__(self) -> None:
        self._call: Any = None

    def __enter__(self) -> Self:
        torch.set_num_threads(cpu_count())
        self._call = self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call = None

    def run(self, batch: Batch) -> Embeddings:
        """See `Runner.run`."""
        if self._call is None:
            raise RunnerError(f"{self.name} is not open; use it in a `with` statement")
        with torch.inference_mode():
            output: Embeddings = self._call(torch.from_numpy(batch)).numpy()
        return output

    def _open(self) -> Any:
        raise NotImplementedError


class EagerRunner(TorchRunner):
    """A tower as PyTorch runs it: what everything else is compared with."""

    name = "eager:fp32"

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self._tower = tower

    def _open(self) -> nn.Module:
        return self._tower.eval()


class CompiledRunner(EagerRunner):
    """A tower through `torch.compile`; its first run compiles, and needs a C++ compiler."""

    name = "compiled:fp32"

    def _open(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it imports uses torch.jit, which is deprecated
            return torch.compile(super()._open(), dynamic=True)


class TorchScriptRunner(TorchRunner):
    """A file that `export.to_torchscript` wrote."""

    name = "torchscript:fp32"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def _open(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit's own deprecation
            return torch.jit.load(self._path, map_location="cpu")  # type: ignore[no-untyped-call]
