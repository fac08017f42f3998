"""Zero-shot classification: the probability of each label for an image.

    classifier = ZeroShotClassifier(embedder, ["cat", "dog"], TEMPLATES["openai-7"])
    classifier.classify(["cat.jpg"])          # float32 [1, 2]
    classifier.save("pets.npz")               # the class embeddings, for other processes

The method is that of Radford et al. 2021, section 3.1.4. Each label is inserted into every prompt
template. The class embedding of a label is the mean of the embeddings of these prompts, scaled to
unit length. Probabilities are the softmax over the cosines times the checkpoint's logit scale.
"""

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np

from serving.bundles.identity import ModelIdentity
from serving.errors import InputError, TextError, excerpt
from serving.inputs.images import Images
from serving.inputs.labels import LabelSet
from serving.tasks.embedder import Embedder, Floats
from serving.tasks.readable import Errors, in_batches
from serving.util.directories import read_lines
from serving.util.files import write_bytes
from serving.util.progress import Progress, silent
from serving.util.typed_json import json_text, parse_json

TEMPLATES = {
    "plain": ("a photo of a {}.",),
    "openai-7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Prompt templates by name. `openai-7`: the seven that performed best on ImageNet, according to the
notebook `Prompt_Engineering_for_ImageNet.ipynb` of openai/CLIP."""

CLASSIFIER_FORMAT = 1
"""Version of the file format of saved classifiers. No other version can be loaded."""

_GROUP = 8192
"""Texts embedded at a time, which bounds the memory of their embeddings."""


def embed_labels(
    embedder: Embedder,
    labels: Iterable[str],
    templates: Iterable[str] | None = None,
    *,
    progress: Progress = silent,
) -> Floats:
    """Return the class embeddings of labels, float32 [labels, dim], unit length.

    Args:
        embedder: `ClipClient` or `LocalClip`, entered.
        labels: distinct labels.
        templates: prompt templates; default: those of the checkpoint.
        progress: receives the number of embedded texts, of labels x templates in total.

    Raises:
        TextError: `LabelSet` does not accept the labels or templates, or a label is too long; the
            error says which.
    """
    wanted = LabelSet.of(labels, embedder.templates if templates is None else templates)
    return embed_label_set(embedder, wanted, progress)


def embed_label_set(embedder: Embedder, wanted: LabelSet, progress: Progress = silent) -> Floats:
    """Return the class embeddings of a label set, as `embed_labels` does."""
    order = wanted.by_template()
    classes = ClassEmbeddings(len(wanted.labels), len(wanted.templates))
    for start in range(0, len(wanted), _GROUP):
        progress("embedding texts", start, len(wanted))
        some = order[start : start + _GROUP]
        try:
            embeddings = embedder.embed_texts(wanted.some(some))
        except TextError as error:
            raise wanted.blamed(error, some) from error
        classes.add(some, embeddings)
    return classes.unit()


class ClassEmbeddings:
    """Accumulator of class embeddings: the mean over the prompt templates, at unit length.

    Args:
        labels: number of labels.
        templates: number of templates. Text i is label i // templates in template i % templates.
    """

    def __init__(self, labels: int, templates: int) -> None:
        self._labels, self._templates = labels, templates
        self._sums: Floats | None = None

    def add(self, texts: Sequence[int], embeddings: Floats) -> None:
        """Add the embeddings of the texts with these indices, float32 [n, dim], unit length."""
        if self._sums is None:
            self._sums = np.zeros((self._labels, embeddings.shape[1]), np.float32)
        np.add.at(self._sums, np.asarray(texts) // self._templates, embeddings)

    def unit(self) -> Floats:
        """Return the class embeddings, float32 [labels, dim], after every text was added."""
        assert self._sums is not None  # a label set has at least one text
        result: Floats = self._sums / np.linalg.norm(self._sums, axis=1, keepdims=True)
        return result


def softmax(logits: Floats) -> Floats:
    """Return the softmax over the last axis."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


def probabilities(images: Floats, labels: Floats, logit_scale: float) -> Floats:
    """Return class probabilities: [n, dim] and [labels, dim] -> float32 [n, labels]."""
    return softmax(np.float32(logit_scale) * (images @ labels.T))


class ZeroShotClassifier:
    """Classifier for a fixed label set, which is embedded once.

    Args:
        embedder: embeds the labels and the images.
        labels: distinct labels.
        templates: prompt templates; default: those of the checkpoint.
        progress: receives the number of embedded texts.

    Raises:
        TextError: see `embed_labels`.
    """

    def __init__(
        self,
        embedder: Embedder,
        labels: Iterable[str],
        templates: Iterable[str] | None = None,
        *,
        progress: Progress = silent,
    ) -> None:
        wanted = LabelSet.of(labels, embedder.templates if templates is None else templates)
        self._embedder = embedder
        self.embeddings = embed_label_set(embedder, wanted, progress)
        """Class embeddings, float32 [labels, dim], unit length."""
        self.labels, self.templates = wanted.labels, wanted.templates

    def classify(self, images: Images) -> Floats:
        """Return the probability of each label for each image, float32 [n, labels].

        Rows sum to 1.

        Args:
            images: any number of images, or one; see `serving.inputs.images.ImageInput`.

        Raises:
            ImageError: an image cannot be used; the error says which and why.
        """
        return self.classify_embeddings(self._embedder.embed_images(images))

    def classify_embeddings(self, images: Floats) -> Floats:
        """Classify images that are already embedded, float32 [n, dim]; see `classify`."""
        return probabilities(images, self.embeddings, self._embedder.logit_scale)

    def batches(
        self, images: Images, size: int = 64, errors: Errors | None = None
    ) -> Iterator[Floats]:
        """Classify any number of images, `size` at a time, and yield the results of `classify`.

        Args:
            images: any number of images.
            size: maximum number of images at a time.
            errors: receives the error of each image that cannot be used, by its index; the results
                then leave these images out. None: such an error is raised.

        Raises:
            ImageError: see `classify`.
        """
        return in_batches(self.classify, images, size, errors)

    def top_k(self, images: Images, k: int) -> list[list[tuple[str, float]]]:
        """Return the `k` best labels of each image with their probabilities, best first.

        Labels with equal probabilities keep their order. If `k` exceeds the number of labels, all
        labels are returned.

        Raises:
            InputError: `k` is less than 1.
        """
        if k < 1:
            raise InputError(
                f"expected k, the number of labels per image, to be 1 or more; got {k}"
            )
        scores = self.classify(images)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            [(self.labels[index], float(row[index])) for index in best]
            for row, best in zip(scores, order, strict=True)
        ]

    def save(self, path: str | Path) -> None:
        """Write the class embeddings and the identity of their model to `path`, an .npz file."""
        facts = {
            "format": CLASSIFIER_FORMAT,
            "labels": self.labels,
            "templates": self.templates,
            "model": asdict(self._embedder.identity),
        }
        buffer = io.BytesIO()
        np.savez(buffer, embeddings=self.embeddings, facts=np.array(json_text(facts)))
        write_bytes(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path, embedder: Embedder) -> Self:
        """Load a classifier that `save` wrote, without embedding the labels again.

        Raises:
            InputError: the file does not exist or is damaged, or its embeddings belong to another
                model than `embedder`.
        """
        labels, templates, saved, embeddings = _read(Path(path))
        if not saved.fits(embedder.identity):
            raise InputError(
                f"{path} holds labels embedded by {saved}, but images are embedded by "
                f"{embedder.identity}",
                advice="embed the labels again with this model",
            )
        loaded = cls.__new__(cls)
        loaded._embedder = embedder
        loaded.labels, loaded.templates = labels, templates
        loaded.embeddings = embeddings
        return loaded


def _read(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], ModelIdentity, Floats]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            facts, embeddings = parse_json(str(file["facts"])), file["embeddings"]
        if facts["format"] != CLASSIFIER_FORMAT:
            raise InputError(
                f"{path} has format {facts['format']!r}, expected {CLASSIFIER_FORMAT}",
                advice="save the classifier again with this version",
            )
        model = ModelIdentity(**facts["model"])
        expected = (len(facts["labels"]), model.embed_dim)
        if embeddings.dtype != np.float32 or embeddings.shape != expected:
            raise ValueError(f"embeddings {embeddings.dtype} {list(embeddings.shape)}")
        if not np.isfinite(embeddings).all():
            raise ValueError("an embedding is not finite")
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file", advice="give a file that ZeroShotClassifier.save() wrote"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not a saved classifier, or is damaged ({error})", advice="save it again"
        ) from error
    return tuple(facts["labels"]), tuple(facts["templates"]), model, embeddings


def read_templates(source: str) -> tuple[str, ...]:
    """Return a built-in template set, see `TEMPLATES`, or read a UTF-8 file with one per line.

    Raises:
        InputError: `source` is neither a name nor a file, or the file has no templates.
        TextError: the file is not UTF-8.
    """
    if source in TEMPLATES:
        return TEMPLATES[source]
    if not Path(source).is_file():
        raise InputError(
            f"{excerpt(source, 200)} is neither a file with one template per line nor one of the "
            f"built-in sets: {', '.join(TEMPLATES)}"
        )
    found = tuple(read_lines(Path(source)))
    if not found:
        raise InputError(
            f"{source} has no templates", advice="give one per line, such as 'a photo of {}'"
        )
    return found
