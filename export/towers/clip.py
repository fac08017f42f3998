"""CLIP's image and text towers as `nn.Module`s, with the inputs and outputs of the exported graphs.

    image  pixels     uint8 [batch, 3, size, size] RGB -> image_embeds float32 [batch, dim]
    text   input_ids  int32 [batch, length <= context] -> text_embeds  float32 [batch, dim]

Embeddings have unit length.

The image tower includes pixel scaling and normalization by mean and std. LayerNorm and softmax
compute in float32, whatever the dtype of the weights. The last transformer block computes only the
pooled token. This is exact, because no other token is read after it, and saves about one twelfth of
the work of a 12-layer tower.

The architectures are those of Radford et al. 2021 (arXiv:2103.00020). `export.checkpoints` loads
weights into them, `export.graphs` exports them.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.towers.resnet import ModifiedResNet, ResNetConfig, fold_batch_norms
from export.towers.transformer import Activation, LayerNorm, TransformerConfig, transformer

__all__ = [
    "MASKED",
    "Activation",
    "Clip",
    "ClipConfig",
    "ImageTower",
    "ResNetConfig",
    "TextConfig",
    "TextTower",
    "VisionTransformerConfig",
    "float16_overflow",
    "for_inference",
    "half_precision",
]

MASKED = -3e4
"""Value added to the attention score of a masked token. It is finite, so that a float16 graph has
no infinity; e^-30000 is 0 in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTransformerConfig(TransformerConfig):
    """Configuration of a vision transformer."""

    image_size: int
    patch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig(TransformerConfig):
    """Configuration of a causal text tower."""

    context_length: int
    vocab_size: int
    end_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Configuration of both towers and of their shared embedding space."""

    embed_dim: int
    image: VisionTransformerConfig | ResNetConfig
    text: TextConfig


class VisionTransformer(nn.Module):
    """Vision transformer that pools the class token."""

    def __init__(self, config: VisionTransformerConfig, embed_dim: int) -> None:
        super().__init__()
        width, patches = config.width, (config.image_size // config.patch_size) ** 2
        scale = width**-0.5
        self.patch_embedding = nn.Conv2d(
            3, width, config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.position_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.pre_norm = LayerNorm(width, config.norm_eps)
        self.blocks = nn.ModuleList(transformer(config))
        self.post_norm = LayerNorm(width, config.norm_eps)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=scale)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of matrix products."""
        return self.patch_embedding.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images `[batch, 3, size, size]` to `[batch, dim]`."""
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.pre_norm(torch.cat([classes, x], dim=1) + self.position_embedding)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        x = last(x, pool=lambda tokens: tokens[:, :1])
        projected: Tensor = self.projection(self.post_norm(x[:, 0]))
        return projected


class ImageTower(nn.Module):
    """Image tower: uint8 `pixels` [batch, 3, size, size] -> float32 `image_embeds` [batch, dim].

    Embeddings have unit length.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(
        self,
        config: VisionTransformerConfig | ResNetConfig,
        embed_dim: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = (
            ModifiedResNet(config, embed_dim)
            if isinstance(config, ResNetConfig)
            else VisionTransformer(config, embed_dim)
        )
        # In units of uint8 levels, so that one subtraction and one product normalize an image.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        inverse = 1 / (255 * torch.tensor(std).view(3, 1, 1))
        self.register_buffer("inverse_std", inverse, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:  # noqa: D102
        normalized = (pixels.float() - self.mean) * self.inverse_std
        return F.normalize(self.encoder(normalized.to(self.encoder.dtype)).float(), dim=-1)


class TextTower(nn.Module):
    """Text tower: int32 `input_ids` [batch, length] -> float32 `text_embeds` [batch, dim].

    Embeddings have unit length. The tower pools the first end-of-text token. Attention is causal,
    so padding after that token does not change the result, and a batch can be cut to the length of
    its longest text.

    Any token ids give an embedding, so that a wrong text cannot fail the other texts of its batch:
    ids outside the vocabulary are replaced by 0, tokens beyond the context length are cut off, and
    a text without an end-of-text token is pooled at its last position.
    """

    causal_mask: Tensor
    positions: Tensor

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(
            0.01 * torch.randn(config.context_length, config.width)
        )
        self.blocks = nn.ModuleList(transformer(config))
        self.post_norm = LayerNorm(config.width, config.norm_eps)
        self.projection = nn.Linear(config.width, embed_dim, bias=False)
        mask = torch.full((config.context_length, config.context_length), MASKED).triu(1)
        self.register_buffer("causal_mask", mask, persistent=False)
        positions = torch.arange(config.context_length, dtype=torch.int32)
        self.register_buffer("positions", positions, persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=config.width**-0.5)

    def forward(self, input_ids: Tensor) -> Tensor:  # noqa: D102
        input_ids = input_ids[:, : self.config.context_length]
        length = input_ids.shape[1]
        # Not `clamp`: ONNX Runtime's CUDA provider has no Clip of int32.
        known = (input_ids >= 0) & (input_ids < self.config.vocab_size)
        ids = torch.where(known, input_ids, 0)
        x = self.token_embedding(ids) + self.position_embedding[:length]
        mask = self.causal_mask[:length, :length]
        # Compared as integers, because 49406 and 49407 are the same number in float16.
        places = torch.where(input_ids == self.config.end_id, self.positions[:length], length - 1)
        end = places.amin(dim=1).long()
        index = end[:, None, None]
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask)
        x = last(
            x,
            mask[end][:, None, None],
            pool=lambda tokens: tokens.gather(1, index.expand(-1, 1, tokens.shape[2])),
        )
        return F.normalize(self.projection(self.post_norm(x[:, 0])).float(), dim=-1)


def for_inference(tower: ImageTower | TextTower) -> ImageTower | TextTower:
    """Return a copy of `tower` in eval mode, with batch norms folded into convolutions."""
    copied = copy.deepcopy(tower).eval()
    fold_batch_norms(copied)
    return copied


def half_precision(
    tower: ImageTower | TextTower, dtype: torch.dtype = torch.float16
) -> ImageTower | TextTower:
    """Return a copy of `tower` for inference whose matrix products run in float16 or bfloat16.

    LayerNorm, softmax, pixel normalization, mask and the final normalization stay in float32.
    """
    half = for_inference(tower).to(dtype)
    for module in half.modules():
        if isinstance(module, LayerNorm):
            module.float()
    for name, constant in tower.named_buffers(recurse=False):
        setattr(half, name, constant)
    return half


def float16_overflow(tower: ImageTower | TextTower) -> tuple[str, float] | None:
    """Return name and value of a weight of `half_precision(tower)` that is infinite in float16.

    Returns:
        None if all weights are finite there.
    """
    for name, weight in for_inference(tower).state_dict().items():
        if weight.is_floating_point() and (infinite := weight.half().isinf()).any():
            return name, weight[infinite][0].item()
    return None


class Clip(nn.Module):
    """Both towers and the logit scale they were trained with."""

    def __init__(self, config: ClipConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image, config.embed_dim, mean, std)
        self.text = TextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
