"""The text tower over trees of tokens, which compute a beginning that texts share once.

The same weights and the same arithmetic as `towers.TextTower`: attention is causal, so a token
needs the tokens before it in its text and no others, wherever they stand in a row.
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
    """int32 `trees` [rows, 2, nodes] -> float32 `text_embeds` [leaves, dim], unit length.

    `serving.inputs.prefix_tree` tells what the numbers are; a leaf is an end-of-text token, and the
    leaves of a row come in its order, behind those of the rows before.
    """

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, trees: Tensor) -> Tensor:  # noqa: D102
        tower, ids, ends = self.tower, trees[:, 0], trees[:, 1]
        node = torch.arange(ids.shape[1], device=ids.device)
        seen = (node <= node[:, None]) & (node[:, None] < ends[:, None])
        mask = torch.where(seen, 0.0, MASKED)[:, None]
        position = seen.sum(-1) - 1  # as many as there are tokens before it
        x = tower.token_embedding(ids) + tower.position_embedding[position]
        *blocks, last = tower.blocks
        for block in blocks:
            x = block(x, mask)
        assert isinstance(last, Block)
        # Leaves differ in number from row to row, so attention is not cut to them; the rest is.
        context = last.norm1(x)
        x = x + last.attention(context, context, mask)
        x = x[ids == tower.config.end_id][None]  # three axes keep the MLP's products MatMuls
        x = x + last.mlp(last.norm2(x))
        return F.normalize(tower.projection(tower.post_norm(x[0])).float(), dim=-1)


def in_trees(batches: Iterable[Batch], end_id: int) -> list[Batch]:
    """The texts of `batches`, each `input_ids` int32 [n, length], as batches of trees."""
    return [tree.nodes for ids in batches for tree in trees(ids.astype(np.int32), end_id)]
