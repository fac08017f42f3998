"""Pre-norm transformer blocks of both CLIP towers.

LayerNorm and softmax compute in float32, whatever the dtype of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Configuration of a stack of pre-norm transformer blocks."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation
    norm_eps: float = 1e-5


class LayerNorm(nn.LayerNorm):
    """Layer normalization that computes in float32 and returns the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weight, bias = self.weight.float(), self.bias.float()
        out = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return out.to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention over `[batch, heads, length, head_dim]`, with softmax in float32.

    During export, attention is written as separate operators, which runtimes fuse. Below opset 23,
    the exporter adds an IsNaN guard in every layer to PyTorch's fused operator with a mask.
    """
    if not torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(
            query, key, value, None if mask is None else mask.to(query.dtype)
        )
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    mixed: Tensor = scores.softmax(-1).to(value.dtype) @ value
    return mixed


class Attention(nn.Module):
    """Multi-head attention with separate projections, the form that OpenVINO fuses best."""

    def __init__(self, width: int, heads: int, output_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, output_width or width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the attention of `x` [batch, n, width] to `context` [batch, m, width]."""
        query, key, value = self.query(x), self.key(context), self.value(context)
        mixed = attend(self._split(query), self._split(key), self._split(value), mask)
        merged: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return merged

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with the checkpoint's activation function between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.up(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        down: Tensor = self.down(x)
        return down


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config.width, config.heads)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute all tokens of `x`, or only the tokens that `pool` selects.

        Selected tokens still attend to all tokens.
        """
        context = self.norm1(x)
        query = context
        if pool is not None:
            x, query = pool(x), pool(context)
        x = x + self.attention(query, context, mask)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def transformer(config: TransformerConfig) -> list[Block]:
    """Return blocks initialized as in OpenAI's text transformer.

    See clip/model.py, `initialize_parameters`.
    """
    width, blocks = config.width, [Block(config) for _ in range(config.layers)]
    residual = width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        for linear, std in (
            (attention.query, width**-0.5),
            (attention.key, width**-0.5),
            (attention.value, width**-0.5),
            (attention.output, residual),
            (mlp.up, (2 * width) ** -0.5),
            (mlp.down, residual),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
    return blocks
