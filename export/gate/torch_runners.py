"""PyTorch behind the runner interface: eager (the reference), compiled, and TorchScript.

On the CPU a runner is called `eager:fp32`, on an NVIDIA GPU `eager-cuda:fp16`.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from export.towers.clip import ImageTower, TextTower, for_inference, half_precision
from serving.errors import RunnerError
from serving.runners.base import Batch, Embeddings, LoadedRunner
from serving.runners.spec import RunnerSpec
from serving.util.machine import cpu_count

TorchPrecision = Literal["fp32", "tf32", "fp16", "bf16"]
"""Of matrix products; tf32 is float32 whose factors a GPU rounds to ten bits of mantissa."""

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRunner(LoadedRunner):
    """A callable on tensors: on the CPU with explicit threads, or on a GPU with explicit TF32."""

    kind: ClassVar[str]
    runtime_version = f"torch {torch.__version__}"

    def __init__(self, device: str, precision: TorchPrecision) -> None:
        self.device = torch.device(device)
        self.precision = precision
        runtime = self.kind if self.device.type == "cpu" else f"{self.kind}-{self.device.type}"
        self.spec = RunnerSpec(runtime, precision)

    def launcher(self, batch: Batch) -> Callable[[], Tensor]:
        """A call that runs `batch`, which is on the device already, and waits for nothing.

        For timing without the transfers; whoever reads a clock synchronises first.
        """
        with (
            torch.inference_mode()
        ):  # as in `run`: compiled code is specific to how a tensor was made
            prepared = self._tensor(batch)

        def launch() -> Tensor:
            with torch.inference_mode():
                return self._forward(prepared)

        return launch

    def _load(self) -> Any:
        if self.device.type == "cuda" and not torch.cuda.is_available():
            built = torch.version.cuda
            here = "sees no NVIDIA GPU" if built else "is built without CUDA"
            raise RunnerError(
                f"{self.name} needs an NVIDIA GPU, and torch {torch.__version__} {here}; "
                f"{'look at `nvidia-smi`' if built else 'install a CUDA build of it'}, "
                "or run it on the CPU"
            )
        if self.device.type != "cuda" and self.precision == "tf32":
            raise RunnerError(f"{self.name}: only NVIDIA GPUs compute in TF32; take fp32")
        return self._module()

    @abstractmethod
    def _module(self) -> Any:
        """The callable, on `self.device`, in `self.precision`."""

    def _tensor(self, batch: Batch) -> Tensor:
        return torch.from_numpy(batch).to(self.device)

    def _forward(self, batch: Tensor) -> Tensor:
        if self.device.type == "cpu":
            torch.set_num_threads(cpu_count())
        else:
            allow_tf32(self.precision == "tf32")
        output: Tensor = self._loaded(batch)
        return output

    def _infer(self, batch: Batch) -> Embeddings:
        with torch.inference_mode():
            output: Embeddings = self._forward(self._tensor(batch)).cpu().numpy()
        return output


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may compute float32 products and convolutions in TF32, in this process.

    PyTorch's own default is yes in convolutions and no in products, which is neither of the two.
    """
    if (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) != (allowed,) * 2:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


class EagerRunner(TorchRunner):
    """A tower as PyTorch runs it: on the CPU in float32, what everything else is compared with."""

    kind = "eager"

    def __init__(
        self,
        tower: ImageTower | TextTower,
        device: str = "cpu",
        precision: TorchPrecision = "fp32",
    ) -> None:
        super().__init__(device, precision)
        self._tower = tower

    def _module(self) -> Any:
        if half := _HALVES.get(self.precision):
            return half_precision(self._tower, half).to(self.device)
        if self.device.type == "cpu":
            return self._tower.eval()
        return for_inference(self._tower).to(self.device)  # a copy: the caller's stays where it is


class CompiledRunner(EagerRunner):
    """A tower through `torch.compile`; its first run compiles, and needs a C++ compiler, on a GPU
    Triton and a C compiler.

    One compilation holds for all batches of two and more, another for single items.
    """

    kind = "compiled"

    def _module(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it imports uses torch.jit, which is deprecated
            from torch._inductor import compile_fx  # noqa: F401 - else the first run imports it

            # On a GPU the batch alone is dynamic, see _tensor: sizes that are known make better
            # kernels, and a second length of texts makes lengths dynamic by itself.
            dynamic = True if self.device.type == "cpu" else None
            # Whole or not at all: without fullgraph what cannot be compiled would run eagerly.
            return torch.compile(super()._module(), dynamic=dynamic, fullgraph=True)

    def _tensor(self, batch: Batch) -> Tensor:
        tensor = super()._tensor(batch)
        if self.device.type != "cpu":
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return tensor


class TorchScriptRunner(TorchRunner):
    """A file that `export.graphs.torchscript` wrote of a tower in `precision`."""

    kind = "torchscript"

    def __init__(self, path: Path, device: str = "cpu", precision: TorchPrecision = "fp32") -> None:
        super().__init__(device, precision)
        self._path = path

    def _module(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit's own deprecation
            return torch.jit.load(self._path, map_location=self.device)  # type: ignore[no-untyped-call]
