"""Pairs of pictures and captions, and the batches they are trained in.

Which captions a step sees follows from the seed and the step's number alone: nothing has to be
remembered to continue a run where it stopped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.errors import InputError


@dataclass(frozen=True, slots=True)
class PairKind:
    """Captions of one source, and how much of every batch they make up."""

    groups: Tensor
    """int64 [groups, members]: captions by index; those in a row always share a batch."""
    share: float
    """Relative to the other kinds'."""
    from_step: int = 0
    """The first step that takes this kind; a course may begin with what is easiest."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pictures and their captions."""

    pixels: Tensor
    """uint8 [pictures, 3, size, size]."""
    input_ids: Tensor
    """int32 [captions, length], padded behind the end-of-text token."""
    picture_of: Tensor
    """int64 [captions]: the picture that a caption is about."""
    kinds: dict[str, PairKind]


class MixedBatches:
    """Batches that mix the kinds by their shares, in an order that seed and step alone decide."""

    def __init__(self, kinds: dict[str, PairKind], batch_size: int, seed: int) -> None:
        self.kinds = list(kinds.values())
        self.batch_size = batch_size
        self.seed = seed
        self.orders: dict[int, tuple[int, Tensor]] = {}
        for step in sorted({kind.from_step for kind in self.kinds}):
            for (name, kind), count in zip(kinds.items(), self._counts(step), strict=True):
                if len(kind.groups) < count:
                    raise InputError(
                        f"a batch of {batch_size} takes {count} groups of kind {name!r}, but there "
                        f"are {len(kind.groups)}; give more pairs or a smaller batch"
                    )

    def __call__(self, step: int) -> Tensor:
        """Captions of `step` by index, int64 [about batch_size]; none occurs twice."""
        parts = []
        for index, (kind, count) in enumerate(zip(self.kinds, self._counts(step), strict=True)):
            if count:
                epoch, position = divmod(step, len(kind.groups) // count)
                chosen = self._order(index, epoch)[position * count : (position + 1) * count]
                parts.append(kind.groups[chosen].flatten())
        return torch.cat(parts)

    def _counts(self, step: int) -> list[int]:
        """Groups of each kind in the batch of `step`."""
        shares = [kind.share if step >= kind.from_step else 0.0 for kind in self.kinds]
        pictures = [self.batch_size * share / sum(shares) for share in shares]
        return [
            max(1, round(part / kind.groups.shape[1])) if part else 0
            for kind, part in zip(self.kinds, pictures, strict=True)
        ]

    def _order(self, index: int, epoch: int) -> Tensor:
        """The order of a kind's groups in one epoch, int64 [groups]."""
        if index not in self.orders or self.orders[index][0] != epoch:
            generator = torch.Generator().manual_seed(
                (self.seed * 1009 + index) * 1_000_003 + epoch
            )
            order = torch.randperm(len(self.kinds[index].groups), generator=generator)
            self.orders[index] = (epoch, order)
        return self.orders[index][1]
