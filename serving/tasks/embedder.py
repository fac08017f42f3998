"""What turns pictures and texts into embeddings, and which model's embeddings they are.

`ClipClient` asks a server, `LocalClip` runs in this process; what is built on embeddings (zero-shot
classification, search, ranking) takes either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.inputs.preprocess import Picture

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Whose embeddings: those of two models must not be compared, whatever their dimension."""

    name: str
    """For people; the same weights may be exported under several names."""
    weights_sha256: str
    embed_dim: int

    def fits(self, other: "ModelIdentity") -> bool:
        """Whether embeddings of both may be compared: same weights, whatever the precision."""
        return (self.weights_sha256, self.embed_dim) == (other.weights_sha256, other.embed_dim)

    def __str__(self) -> str:
        """Such as `tiny-clip (32 dimensions, weights 0123456789ab...)`."""
        return f"{self.name} ({self.embed_dim} dimensions, weights {self.weights_sha256[:12]}...)"


class Embedder(Protocol):
    """What turns pictures and texts into embeddings: `ClipClient` or `LocalClip`."""

    @property
    def identity(self) -> ModelIdentity:
        """Whose embeddings these are."""

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with before a softmax."""

    @property
    def templates(self) -> tuple[str, ...]:
        """The checkpoint's own prompts, each with a `{}`."""

    def embed_images(self, images: Sequence[Picture]) -> Floats:
        """float32 [n, dim], unit length."""

    def embed_texts(self, texts: Sequence[str], *, truncate: bool = False) -> Floats:
        """float32 [n, dim], unit length."""
