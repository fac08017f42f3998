"""Zero-shot accuracy of a trained model on newly drawn pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from export.towers.clip import Clip
from serving.bundles.manifest import ImageSpec, TextSpec
from serving.inputs.preprocess import preprocess
from serving.util.progress import Progress, silent, tracked
from training.dataset import encode
from training.scenes import swapped_couples
from training.shapes import PAIRS, SEEN, Pair, draw, draw_labelled, label

BATCH = 250


@dataclass(frozen=True, slots=True)
class Model:
    """Trained model with its preprocessing and tokenizer."""

    clip: Clip
    image: ImageSpec
    tokenizer: Tokenizer
    text: TextSpec


@torch.inference_mode()
def embed_pixels(model: Model, pixels: Tensor) -> Tensor:
    """Embed pixels, uint8 [n, 3, size, size], to float32 [n, dim] of unit length."""
    model.clip.eval()
    return torch.cat([model.clip.image(batch) for batch in torch.split(pixels, BATCH)])


@torch.inference_mode()
def embed_texts(model: Model, texts: Sequence[str]) -> Tensor:
    """Embed texts, to float32 [texts, dim] of unit length."""
    model.clip.eval()
    input_ids = encode(model.tokenizer, model.text, texts)
    return torch.cat([model.clip.text(batch) for batch in torch.split(input_ids, BATCH)])


def embed_labels(model: Model, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return class embeddings, the mean over prompts: float32 [labels, dim], unit length."""
    prompts = [template.format(text) for text in labels for template in templates]
    embeddings = embed_texts(model, prompts).view(len(labels), len(templates), -1)
    return F.normalize(embeddings.mean(dim=1), dim=-1)


def zero_shot_accuracy(
    model: Model,
    templates: Sequence[str],
    pairs: Sequence[Pair],
    seed: int,
    count: int,
    size: int,
    progress: Progress = silent,
) -> float:
    """Measure the top-1 accuracy, 0..1, over all 100 labels on newly drawn pictures.

    Args:
        model: the model.
        templates: prompt templates that labels are put into.
        pairs: colors and shapes to draw.
        seed: seed of the pictures.
        count: number of pictures.
        size: size of the pictures in pixels, before the model's preprocessing.
        progress: called after each picture.
    """
    labels = [label(pair) for pair in PAIRS]
    drawn = tracked(progress, "measuring", draw_labelled(seed, count, size, pairs), count)
    pixels, truth = [], []
    for picture, text in drawn:
        pixels.append(preprocess(picture, model.image))
        truth.append(labels.index(text))
    images = embed_pixels(model, torch.from_numpy(np.stack(pixels)))
    scores = images @ embed_labels(model, labels, templates).T
    return _fraction(scores.argmax(dim=1) == torch.tensor(truth))


def binding_accuracy(model: Model, seed: int, count: int, size: int) -> float:
    """Measure the accuracy, 0..1, of telling two shapes from the same shapes with swapped colors.

    A picture of a red star and a blue ring has to be nearer to `a red star and a blue ring` than to
    `a blue star and a red ring`. Both captions have the same words, so a model needs their order.

    Args:
        model: the model.
        seed: seed of the pictures.
        count: number of pictures.
        size: size of the pictures in pixels, before the model's preprocessing.
    """
    rng = np.random.default_rng(seed)
    scenes = [scene for _ in range(count // 2) for scene in swapped_couples(rng, SEEN)]
    pixels = [preprocess(draw(scene, size), model.image) for scene in scenes]
    pairs = [[(thing.colour, thing.shape) for thing in scene.things] for scene in scenes]
    texts = [" and ".join(map(label, both)) for both in pairs]
    images = embed_pixels(model, torch.from_numpy(np.stack(pixels)))
    captions = embed_texts(model, texts)
    # [couples, pictures, captions]
    scores = images.view(count // 2, 2, -1) @ captions.view(count // 2, 2, -1).transpose(1, 2)
    return _fraction(scores.argmax(dim=2) == torch.arange(2))


def _fraction(right: Tensor) -> float:
    return float(right.float().mean())
