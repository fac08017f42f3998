"""Independent references: OpenAI's own model and vocabulary, and transformers' CLIP.

`import clip` needs torchvision, so its modules are loaded by path.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

PACKAGE = Path(importlib.util.find_spec("clip").submodule_search_locations[0])
VOCABULARY = PACKAGE / "bpe_simple_vocab_16e6.txt.gz"

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def openai_module(name: str) -> ModuleType:
    """`model` or `simple_tokenizer` of openai-clip."""
    spec = importlib.util.spec_from_file_location(f"openai_clip_{name}", PACKAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def openai_clip(kind: str, seed: int = 0) -> nn.Module:
    """OpenAI's `CLIP`, tiny, with weights and BatchNorm statistics that all affect the output."""
    resnet = kind == "resnet"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = openai_module("model").CLIP(
            embed_dim=32,
            image_resolution=64 if resnet else 32,
            vision_layers=(1, 2, 1, 1) if resnet else 2,
            vision_width=16 if resnet else 128,
            vision_patch_size=None if resnet else 8,
            context_length=77,
            vocab_size=49408,
            transformer_width=64,
            transformer_heads=1,
            transformer_layers=2,
        )
    return randomise(model, seed)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Move every parameter and statistic from its initial value, so that none can be ignored."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * noise(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 0.3 * noise(module.running_mean)
                module.running_var *= torch.exp(0.5 * noise(module.running_var))
    return model.eval()


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """Input of the references for uint8 `pixels`, by the textbook formula, in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return ((torch.from_numpy(pixels).double() / 255 - mean) / std).float()


def unit(x: torch.Tensor) -> np.ndarray:
    """Scale the rows of `x` to unit length."""
    return (x / x.norm(dim=-1, keepdim=True)).detach().numpy()


def some_pixels(count: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, 3, size, size] with the full range of values."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8)


def some_ids(ends: list[int], length: int = 77, pad: int = 49407, seed: int = 0) -> np.ndarray:
    """int32 [len(ends), length]: random texts with the end-of-text token at `ends`, followed by
    `pad`."""
    ids = np.random.default_rng(seed).integers(0, 49406, (len(ends), length)).astype(np.int32)
    for row, end in zip(ids, ends, strict=True):
        row[0], row[end], row[end + 1 :] = 49406, 49407, pad
    return ids
