"""PyTorch's runners: half precision on the CPU, and on a GPU if the machine has one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoints.load import load_checkpoint
from export.gate.parity import expect, judge
from export.gate.torch_runners import CompiledRunner, EagerRunner, TorchScriptRunner
from export.graphs.torchscript import export_torchscript
from export.towers.clip import half_precision
from export.towers.transformer import LayerNorm
from serving.bundles.manifest import TOLERANCES, TOWERS
from serving.errors import RunnerError
from tests.support.references import some_ids, some_pixels

BATCHES = {"image": some_pixels(3, 32), "text": some_ids([1, 5, 15], 16)}
CUDA = torch.cuda.is_available()
without_gpu = pytest.mark.skipif(CUDA, reason="this machine has a GPU")
with_gpu = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # Inductor warns about TF32, among other things.
    pytest.mark.skipif(not CUDA, reason="torch sees no NVIDIA GPU here"),
]


@pytest.fixture(scope="module")
def clip(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint)).clip


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_the_cpu_is_within_tolerance(clip, tower, precision):
    module = getattr(clip, tower)
    with EagerRunner(module) as reference, EagerRunner(module, "cpu", precision) as half:
        assert half.name == f"eager:{precision}"
        want, got = reference.run(BATCHES[tower]), half.run(BATCHES[tower])
        cosines = (want * got).sum(axis=1)
        assert TOLERANCES[precision].min_cosine < cosines.min() < 1 - 1e-7
        assert np.array_equal(half.launcher(BATCHES[tower])().numpy(), got)
    assert next(module.parameters()).dtype == torch.float32


def test_matrix_weights_are_bfloat16(clip):
    """All multiplied weights are converted. Constants at the input and norms are not."""
    half = half_precision(clip.image, torch.bfloat16)
    assert half.encoder.blocks[0].mlp.up.weight.dtype == torch.bfloat16
    assert half.mean.dtype == torch.float32
    norms = [module for module in half.modules() if isinstance(module, LayerNorm)]
    assert {norm.weight.dtype for norm in norms} == {torch.float32}


@without_gpu
@pytest.mark.parametrize("kind", [EagerRunner, CompiledRunner])
def test_cuda_runner_requires_a_gpu_on_entering(clip, kind):
    runner = kind(clip.image, "cuda", "bf16")
    with pytest.raises(RunnerError, match=rf"{kind.kind}-cuda:bf16 needs an NVIDIA GPU, and torch"):
        runner.__enter__()
    with pytest.raises(RunnerError, match="torchscript-cuda:fp32 needs an NVIDIA GPU"):
        TorchScriptRunner(Path("no-such-file"), "cuda").__enter__()


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["eager", "torchscript", "compiled"])
class TestOnGpu:
    """Comparison with eager float32 on the CPU, by the tolerances of the gate."""

    pytestmark = with_gpu

    def test_parity(self, clip, tower, precision, kind, tmp_path):
        module = getattr(clip, tower)
        if kind == "torchscript":
            halves = {"fp16": torch.float16, "bf16": torch.bfloat16}
            half = halves.get(precision)
            export_torchscript(half_precision(module, half) if half else module, tmp_path / "t.pt")
            runner = TorchScriptRunner(tmp_path / "t.pt", "cuda", precision)
        else:
            runner = {"eager": EagerRunner, "compiled": CompiledRunner}[kind](
                module, "cuda", precision
            )
        batches = [BATCHES[tower], BATCHES[tower][:1]]
        with EagerRunner(module) as reference, runner:
            verdict = judge(runner, expect(reference, batches, None), tower)
            launched = runner.launcher(batches[0])()
            assert launched.device.type == "cuda"
            np.testing.assert_allclose(launched.cpu().numpy(), runner.run(batches[0]), atol=1e-3)
        assert verdict.runner == f"{kind}-cuda:{precision}"
        assert verdict.passed, verdict
        assert next(module.parameters()).device.type == "cpu", "the caller's tower was moved"
