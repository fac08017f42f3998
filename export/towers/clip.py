"""CLIP's image and text towers as `nn.Module`s whose boundary is that of every exported graph.

    image  pixels     uint8 [batch, 3, size, size] RGB -> image_embeds float32 [batch, dim]
    text   input_ids  int32 [batch, length <= context] -> text_embeds  float32 [batch, dim]

Embeddings have unit length.

Scaling, mean and std are part of the image tower. LayerNorm and softmax compute in float32 whatever
the weights' dtype is. The last transformer block computes only the pooled token, which nothing but
the pooled token reads: exact, and a twelfth of a 12-layer tower less work.

Does not know: where weights come from (`checkpoint.py`), what is made of the towers (`to_*.py`).
The architectures are those of Radford et al. 2021 (arXiv:2103.00020).
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
    "for_inference",
    "half_precision",
]

MASKED = -3e4
"""Added to the score of what a token must not see. Finite, so that a float16 graph holds no
infinity; e^-30000 is 0 in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTransformerConfig(TransformerConfig):
    """An image tower that cuts the picture into patches."""

    image_size: int
    patch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig(TransformerConfig):
    """A causal text tower."""

    context_length: int
    vocab_size: int
    end_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Both towers and the space they share."""

    embed_dim: int
    image: VisionTransformerConfig | ResNetConfig
    text: TextConfig


class VisionTransformer(nn.Module):
    """Patches, a class token, transformer blocks; the class token is the picture."""

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
        """The dtype that matrix products run in."""
        return self.patch_embedding.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pictures `[batch, 3, size, size]` -> `[batch, dim]`."""
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
    """uint8 `pixels` [batch, 3, size, size] -> float32 `image_embeds` [batch, dim], unit length."""

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
        # In units of uint8 levels, so that one subtraction and one product normalise a picture.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        inverse = 1 / (255 * torch.tensor(std).view(3, 1, 1))
        self.register_buffer("inverse_std", inverse, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:  # noqa: D102
        normalised = (pixels.float() - self.mean) * self.inverse_std
        return F.normalize(self.encoder(normalised.to(self.encoder.dtype)).float(), dim=-1)


class TextTower(nn.Module):
    """int32 `input_ids` [batch, length] -> float32 `text_embeds` [batch, dim], unit length.

    Pools at the first end-of-text token. Attention is causal, so what follows that token, padding
    or nothing, does not reach the result: a batch may be cut to its longest text.
    """

    causal_mask: Tensor

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
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=config.width**-0.5)

    def forward(self, input_ids: Tensor) -> Tensor:  # noqa: D102
        length = input_ids.shape[1]
        x = self.token_embedding(input_ids) + self.position_embedding[:length]
        mask = self.causal_mask[:length, :length]
        # An integer comparison: in float16, 49406 and 49407 would be the same number.
        end = (input_ids == self.config.end_id).int().argmax(dim=1)
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
    """A copy of `tower` in eval mode, its batch norms folded into convolutions."""
    copied = copy.deepcopy(tower).eval()
    fold_batch_norms(copied)
    return copied


def half_precision(
    tower: ImageTower | TextTower, dtype: torch.dtype = torch.float16
) -> ImageTower | TextTower:
    """A copy of `tower` for inference whose matrix products run in `dtype`, float16 or bfloat16.

    LayerNorm, softmax, pixel normalisation, mask and the final normalisation stay in float32.
    """
    half = for_inference(tower).to(dtype)
    for module in half.modules():
        if isinstance(module, LayerNorm):
            module.float()
    for name, constant in tower.named_buffers(recurse=False):
        setattr(half, name, constant)
    return half


class Clip(nn.Module):
    """Both towers and the temperature they were trained with."""

    def __init__(self, config: ClipConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image, config.embed_dim, mean, std)
        self.text = TextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
