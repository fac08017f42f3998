"""Runners of PyTorch: eager (the reference), compiled and TorchScript.

A runner on the CPU has a name such as `eager:fp32`, on an NVIDIA GPU `eager-cuda:fp16`.
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
"""Precision of matrix products. In tf32, a GPU rounds float32 factors to a 10-bit mantissa."""

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRunner(LoadedRunner):
    """Base of the PyTorch runners. Sets the thread count on the CPU and TF32 on a GPU."""

    kind: ClassVar[str]
    runtime_version = f"torch {torch.__version__}"

    def __init__(self, device: str, precision: TorchPrecision) -> None:
        self.device = torch.device(device)
        self.precision = precision
        runtime = self.kind if self.device.type == "cpu" else f"{self.kind}-{self.device.type}"
        self.spec = RunnerSpec(runtime, precision)

    def launcher(self, batch: Batch) -> Callable[[], Tensor]:
        """Return a function that runs `batch` without synchronizing with the device.

        `batch` is copied to the device here, so that timings leave the transfers out. Synchronize
        before you read a clock.
        """
        # As in `run`: torch.compile specializes code on inference tensors.
        with torch.inference_mode():
            prepared = self._tensor(batch)

        def launch() -> Tensor:
            with torch.inference_mode():
                return self._forward(prepared)

        return launch

    def _load(self) -> Any:
        if self.device.type == "cuda" and not torch.cuda.is_available():
            built = torch.version.cuda
            here = "finds none" if built else "is built without CUDA"
            fix = "check `nvidia-smi`" if built else "install a CUDA build of torch"
            raise RunnerError(
                f"{self.name} needs an NVIDIA GPU, and torch {torch.__version__} {here}",
                advice=f"{fix}, or run it on the CPU",
            )
        if self.device.type != "cuda" and self.precision == "tf32":
            raise RunnerError(
                "only NVIDIA GPUs compute in TF32",
                runner=self.name,
                advice="use fp32 on the CPU",
            )
        return self._module()

    @abstractmethod
    def _module(self) -> Any:
        """Return the callable, on `self.device` and in `self.precision`."""

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
    """Set whether GPUs compute float32 matrix products and convolutions in TF32, in this process.

    PyTorch's default allows TF32 in convolutions but not in matrix products.
    """
    if (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) != (allowed,) * 2:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


class EagerRunner(TorchRunner):
    """Runner of a tower in eager PyTorch. On the CPU in float32 it is the parity gate's reference.

    On a GPU it runs a copy of the tower; the caller's tower stays on its device.
    """

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
        return for_inference(self._tower).to(self.device)


class CompiledRunner(EagerRunner):
    """Runner of a tower compiled by `torch.compile`.

    The first run compiles. It needs a C++ compiler, or on a GPU the Triton compiler and a C
    compiler. One compilation serves all batches of two or more items, another serves single items.
    """

    kind = "compiled"

    def _module(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the import below uses torch.jit, which is deprecated
            from torch._inductor import compile_fx  # noqa: F401 - else the first run imports it

            # On a GPU only the batch axis is dynamic (see _tensor), because kernels for known sizes
            # are faster. A second text length makes PyTorch treat the length as dynamic.
            dynamic = True if self.device.type == "cpu" else None
            # Without fullgraph, code that cannot be compiled would silently run in eager mode.
            return torch.compile(super()._module(), dynamic=dynamic, fullgraph=True)

    def _tensor(self, batch: Batch) -> Tensor:
        tensor = super()._tensor(batch)
        if self.device.type != "cpu":
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return tensor


class TorchScriptRunner(TorchRunner):
    """Runner of a file written by `export.graphs.torchscript`, in `precision`."""

    kind = "torchscript"

    def __init__(self, path: Path, device: str = "cpu", precision: TorchPrecision = "fp32") -> None:
        super().__init__(device, precision)
        self._path = path

    def _module(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            return torch.jit.load(self._path, map_location=self.device)  # type: ignore[no-untyped-call]
