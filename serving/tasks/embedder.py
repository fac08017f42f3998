"""What turns pictures and texts into embeddings, and which model's embeddings they are.

`ClipClient` asks a server, `LocalClip` runs in this process; what is built on embeddings (zero-shot
classification, search, ranking) takes either.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.bundles.identity import ModelIdentity
from serving.inputs.preprocess import Picture

Floats = NDArray[np.float32]


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
