"""Initial weights of a vision transformer that shorten the first phase of training.

With random weights, a model learns the shapes of the demo data late: the mean color of a patch has
nearly all of its variance, and positions are indistinguishable. Patch embeddings that whiten, and
regular position embeddings, shorten this plateau. On the shapes of large singles, the shipped tower
reaches a loss of 1.0 nats after 200 batches of 64; from random weights it reaches 2.2 nats, where
chance is 2.3 nats.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from export.towers.clip import ImageTower, VisionTransformer

FLOOR = 0.01
"""Variance added to each component, so that whitening does not amplify noise to the level of
edges."""


@torch.no_grad()
def initialise(tower: ImageTower, pixels: Tensor) -> None:
    """Set the patch embedding to whiten patches, and the position embedding to sines and cosines.

    A ResNet is left unchanged.

    Args:
        tower: image tower, with at most as many channels as a patch has values.
        pixels: images to estimate the covariance of patches from, uint8 [n, 3, size, size].
    """
    encoder = tower.encoder
    if not isinstance(encoder, VisionTransformer):
        return
    kernel = encoder.patch_embedding.weight
    normalized = (pixels.float() - tower.mean) * tower.inverse_std
    patches = F.unfold(normalized, kernel.shape[-1], stride=kernel.shape[-1])
    patches = patches.transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(patches.T.cov())
    whitening = directions / (variances + FLOOR).sqrt()
    kernel.copy_(whitening.flip(1)[:, : len(kernel)].T.view_as(kernel))
    side = math.isqrt(len(encoder.position_embedding) - 1)
    encoder.position_embedding[1:] = sine_positions(side, kernel.shape[0])


def sine_positions(side: int, width: int) -> Tensor:
    """Return position embeddings of a square grid, row by row, float32 [side * side, width].

    Half of the channels encode the row, half the column, each as sines and cosines of `width / 4`
    frequencies from 1 to 1/100 radians per position. `width` has to be a multiple of 4.
    """
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line.expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)
