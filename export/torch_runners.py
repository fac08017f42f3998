"""Eager towers behind the runner interface: the reference everything else is compared with."""

from types import TracebackType
from typing import Self

import torch
from torch import nn

from serving.machine import cpu_count
from serving.runners.base import Batch, Embeddings


class EagerRunner:
    """A tower as PyTorch runs it, float32, on the CPU."""

    name = "eager:fp32"
    runtime_version = f"torch {torch.__version__}"

    def __init__(self, tower: nn.Module) -> None:
        self._tower = tower

    def __enter__(self) -> Self:
        torch.set_num_threads(cpu_count())
        self._tower.eval()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def run(self, batch: Batch) -> Embeddings:
        """See `Runner.run`."""
        with torch.inference_mode():
            output: Embeddings = self._tower(torch.from_numpy(batch)).numpy()
        return output
