"""The `Embedder` protocol, which zero-shot classification, ranking and search are built on.

`ClipClient` implements it with a server, `LocalClip` in this process.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.bundles.identity import ModelIdentity
from serving.inputs.images import Images
from serving.inputs.texts import Texts

Floats = NDArray[np.float32]


class Embedder(Protocol):
    """Protocol of classes that embed images and texts: `ClipClient` and `LocalClip`."""

    @property
    def identity(self) -> ModelIdentity:
        """Model that the embeddings belong to."""

    @property
    def logit_scale(self) -> float:
        """Factor of the cosines before a softmax."""

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates of the checkpoint, each with a `{}`."""

    def embed_images(self, images: Images) -> Floats:
        """Return the embeddings of images, float32 [n, dim], unit length."""

    def embed_texts(self, texts: Texts, *, truncate: bool = False) -> Floats:
        """Return the embeddings of texts, float32 [n, dim], unit length."""
