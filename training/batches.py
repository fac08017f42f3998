"""Training pairs of images and captions, and their batches.

The captions of a step depend only on the seed and on the number of the step, so that a run can
continue where it stopped without any saved state of the batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.errors import InputError


@dataclass(frozen=True, slots=True)
class PairKind:
    """Captions of one kind, and their share of every batch."""

    groups: Tensor
    """Indices of captions, int64 [groups, members]. A batch contains all members of a group."""
    share: float
    """Share of a batch, relative to the shares of the other kinds."""
    from_step: int = 0
    """First step that uses this kind. Training can start with easy kinds only."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Images and their captions."""

    pixels: Tensor
    """Images, uint8 [images, 3, size, size]."""
    input_ids: Tensor
    """Token ids of the captions, int32 [captions, length], padded after the end-of-text token."""
    picture_of: Tensor
    """Index of the image of each caption, int64 [captions]."""
    kinds: dict[str, PairKind]


class MixedBatches:
    """Batches that mix the kinds by their shares, in an order that depends on seed and step only.

    Raises:
        InputError: a kind has fewer groups than one batch needs.
    """

    def __init__(self, kinds: dict[str, PairKind], batch_size: int, seed: int) -> None:
        self.kinds = list(kinds.values())
        self.batch_size = batch_size
        self.seed = seed
        self.orders: dict[int, tuple[int, Tensor]] = {}
        for step in sorted({kind.from_step for kind in self.kinds}):
            for (name, kind), count in zip(kinds.items(), self._counts(step), strict=True):
                if len(kind.groups) < count:
                    raise InputError(
                        f"a batch of {batch_size} needs {count} groups of kind {name!r}, but there "
                        f"are {len(kind.groups)}",
                        advice="give more pairs or a smaller batch size",
                    )

    def __call__(self, step: int) -> Tensor:
        """Return the indices of the captions of `step`, int64 [about batch_size], all different."""
        parts = []
        for index, (kind, count) in enumerate(zip(self.kinds, self._counts(step), strict=True)):
            if count:
                epoch, position = divmod(step, len(kind.groups) // count)
                chosen = self._order(index, epoch)[position * count : (position + 1) * count]
                parts.append(kind.groups[chosen].flatten())
        return torch.cat(parts)

    def _counts(self, step: int) -> list[int]:
        """Return the number of groups of each kind in the batch of `step`."""
        shares = [kind.share if step >= kind.from_step else 0.0 for kind in self.kinds]
        captions = [self.batch_size * share / sum(shares) for share in shares]
        return [
            max(1, round(count / kind.groups.shape[1])) if count else 0
            for kind, count in zip(self.kinds, captions, strict=True)
        ]

    def _order(self, index: int, epoch: int) -> Tensor:
        """Return the order of a kind's groups in one epoch, int64 [groups]."""
        if index not in self.orders or self.orders[index][0] != epoch:
            generator = torch.Generator().manual_seed(
                (self.seed * 1009 + index) * 1_000_003 + epoch
            )
            order = torch.randperm(len(self.kinds[index].groups), generator=generator)
            self.orders[index] = (epoch, order)
        return self.orders[index][1]
