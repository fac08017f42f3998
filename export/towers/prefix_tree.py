"""Text tower over prefix trees of tokens, which computes a shared prefix of texts only once.

It has the same weights and the same arithmetic as `export.towers.clip.TextTower`. Attention is
causal, so a token attends only to the tokens before it in its text, wherever they are in a row.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.towers.clip import MASKED, TextTower
from export.towers.transformer import Block
from serving.inputs.prefix_tree import trees
from serving.runners.base import Batch


class PrefixTreeTower(nn.Module):
    """Text tower: int32 `trees` [rows, 2, nodes] -> float32 `text_embeds` [leaves, dim].

    Embeddings have unit length. `serving.inputs.prefix_tree` describes the input. A leaf is an
    end-of-text token; leaves are in the order of the rows, and of the nodes within a row.
    """

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, trees: Tensor) -> Tensor:  # noqa: D102
        tower, ids, ends = self.tower, trees[:, 0], trees[:, 1]
        node = torch.arange(ids.shape[1], device=ids.device)
        seen = (node <= node[:, None]) & (node[:, None] < ends[:, None])
        mask = torch.where(seen, 0.0, MASKED)[:, None]
        position = seen.sum(-1) - 1  # the number of tokens before it in its text
        x = tower.token_embedding(ids) + tower.position_embedding[position]
        *blocks, last = tower.blocks
        for block in blocks:
            x = block(x, mask)
        assert isinstance(last, Block)
        # Attention is computed for all nodes, because rows have different numbers of leaves. The
        # MLP is computed for the leaves only.
        context = last.norm1(x)
        x = x + last.attention(context, context, mask)
        x = x[ids == tower.config.end_id][None]  # with three axes, the MLP is exported as MatMuls
        x = x + last.mlp(last.norm2(x))
        return F.normalize(tower.projection(tower.post_norm(x[0])).float(), dim=-1)


def in_trees(batches: Iterable[Batch], end_id: int) -> list[Batch]:
    """Convert batches of texts, `input_ids` int32 [n, length], to batches of prefix trees."""
    return [tree.nodes for ids in batches for tree in trees(ids.astype(np.int32), end_id)]
