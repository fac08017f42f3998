"""Zero-shot classification: which of these labels, put into words, fits a picture best?

After Radford et al. 2021, 3.1.4: each label is put into every template, the embeddings are averaged
and brought back to unit length, and the softmax runs over cosines times the checkpoint's scale.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.errors import TextError
from serving.preprocess import Picture

Floats = NDArray[np.float32]


class Embedder(Protocol):
    """What turns pictures and texts into embeddings: `ClipClient` or `LocalClip`."""

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with."""

    @property
    def templates(self) -> tuple[str, ...]:
        """The checkpoint's own prompts, each with one `{}`."""

    def embed_images(self, images: Sequence[Picture]) -> Floats:
        """float32 [n, dim], unit length."""

    def embed_texts(self, texts: Sequence[str], *, truncate: bool = False) -> Floats:
        """float32 [n, dim], unit length."""


def embed_labels(
    embedder: Embedder, labels: Sequence[str], templates: Sequence[str] | None = None
) -> Floats:
    """One embedding a label, float32 [labels, dim], unit length.

    Raises:
        TextError: no labels, the same label twice, or a template without a `{}`.
    """
    prompts = tuple(templates) if templates else embedder.templates
    if not labels:
        raise TextError("no labels to choose from; give at least one")
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise TextError(f"label {min(twice)!r} is given more than once; labels must differ")
    for prompt in prompts:
        if "{}" not in prompt:
            raise TextError(f"template {prompt!r} has no {{}} for the label to go")
    texts = [prompt.replace("{}", label) for label in labels for prompt in prompts]
    embeddings = embedder.embed_texts(texts).reshape(len(labels), len(prompts), -1)
    mean = embeddings.mean(axis=1)
    unit: Floats = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit


def probabilities(images: Floats, labels: Floats, logit_scale: float) -> Floats:
    """Softmax over labels of scaled cosines: [n, dim], [labels, dim] -> float32 [n, labels]."""
    logits = logit_scale * (images @ labels.T)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Floats = exponents / exponents.sum(axis=1, keepdims=True)
    return result


def classify(
    embedder: Embedder,
    images: Sequence[Picture],
    labels: Sequence[str],
    templates: Sequence[str] | None = None,
) -> Floats:
    """Probability of each label for each picture, float32 [n, labels]; rows sum to 1."""
    label_embeddings = embed_labels(embedder, labels, templates)
    return probabilities(embedder.embed_images(images), label_embeddings, embedder.logit_scale)
