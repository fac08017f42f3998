"""Zero-shot classification: which of these labels, put into words, fits a picture best?

    classifier = ZeroShotClassifier(embedder, ["cat", "dog"], TEMPLATES["openai-7"])
    classifier.classify(["cat.jpg"])          # float32 [1, 2]
    classifier.save("pets.npz")               # the labels' embeddings, for the next process

After Radford et al. 2021, 3.1.4: each label is put into every template, the embeddings, of unit
length, are averaged and brought back to unit length, and the softmax runs over cosines times the
checkpoint's scale.
"""

import io
import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np

from serving.bundles.identity import ModelIdentity
from serving.errors import ImageError, InputError, TextError
from serving.inputs.labels import LabelSet
from serving.inputs.preprocess import Picture
from serving.tasks.embedder import Embedder, Floats
from serving.util.directories import read_lines
from serving.util.files import write_bytes
from serving.util.progress import Progress, silent

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
"""Prompts by name. `openai-7`: the seven that served best on ImageNet, from the notebook
`Prompt_Engineering_for_ImageNet.ipynb` of openai/CLIP."""

CLASSIFIER_FORMAT = 1
"""Version of a saved classifier; a reader refuses any other."""

_GROUP = 8192  # texts embedded at a time: what their embeddings take stays small


def embed_labels(
    embedder: Embedder,
    labels: Sequence[str],
    templates: Sequence[str] | None = None,
    *,
    progress: Progress = silent,
) -> Floats:
    """One embedding a label, float32 [labels, dim], unit length.

    Args:
        embedder: what embeds the texts.
        labels: that differ.
        templates: what labels are put into; default: the checkpoint's own.
        progress: told now and then how many of the labels x templates texts are done.

    Raises:
        TextError: what `LabelSet` refuses, or a label that is too long; the message says which.
    """
    wanted = LabelSet.of(labels, embedder.templates if templates is None else templates)
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
    """The embeddings of labels: the mean over their prompt templates, at unit length.

    Args:
        labels: their number.
        templates: their number; text i is label i // templates in template i % templates.
    """

    def __init__(self, labels: int, templates: int) -> None:
        self._labels, self._templates = labels, templates
        self._sums: Floats | None = None

    def add(self, texts: Sequence[int], embeddings: Floats) -> None:
        """Add embeddings, float32 [n, dim], unit length, of the texts with these indices."""
        if self._sums is None:
            self._sums = np.zeros((self._labels, embeddings.shape[1]), np.float32)
        np.add.at(self._sums, np.asarray(texts) // self._templates, embeddings)

    def unit(self) -> Floats:
        """Return float32 [labels, dim], unit length, once every text was added."""
        assert self._sums is not None  # a label set has a text at least
        result: Floats = self._sums / np.linalg.norm(self._sums, axis=1, keepdims=True)
        return result


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


def probabilities(images: Floats, labels: Floats, logit_scale: float) -> Floats:
    """Softmax over labels of scaled cosines: [n, dim], [labels, dim] -> float32 [n, labels]."""
    return softmax(np.float32(logit_scale) * (images @ labels.T))


class ZeroShotClassifier:
    """A set of labels, embedded once; every picture then costs one pass of the image tower.

    Args:
        embedder: what embeds labels and pictures.
        labels: that differ.
        templates: what labels are put into; default: the checkpoint's own.
        progress: told how many of the texts are embedded.

    Raises:
        TextError: see `embed_labels`.
    """

    def __init__(
        self,
        embedder: Embedder,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        progress: Progress = silent,
    ) -> None:
        self._embedder = embedder
        self.embeddings = embed_labels(embedder, labels, templates, progress=progress)
        """float32 [labels, dim], unit length."""
        self.labels = tuple(labels)
        self.templates = tuple(embedder.templates if templates is None else templates)

    def classify(self, images: Sequence[Picture]) -> Floats:
        """Probability of each label for each picture, float32 [n, labels]; rows sum to 1.

        Raises:
            ImageError: a picture cannot be used; the message says which and why.
        """
        return self.classify_embeddings(self._embedder.embed_images(images))

    def classify_embeddings(self, images: Floats) -> Floats:
        """The same of pictures that are embedded already, float32 [n, dim]."""
        return probabilities(images, self.embeddings, self._embedder.logit_scale)

    def batches(self, images: Iterable[Picture], size: int = 64) -> Iterator[Floats]:
        """`classify`, `size` pictures at a time, of any number of pictures.

        Raises:
            ImageError: as `classify`.
        """
        return in_batches(self.classify, images, size)

    def top_k(self, images: Sequence[Picture], k: int) -> list[list[tuple[str, float]]]:
        """The `k` best labels of each picture and their probabilities, best first.

        Of equals the earlier label comes first; k over the number of labels gives all of them.

        Raises:
            InputError: k < 1.
        """
        if k < 1:
            raise InputError(f"expected k, the number of labels an image, to be 1 or more; got {k}")
        scores = self.classify(images)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            [(self.labels[index], float(row[index])) for index in best]
            for row, best in zip(scores, order, strict=True)
        ]

    def save(self, path: str | Path) -> None:
        """Write the labels' embeddings and whose they are to `path`, a NumPy .npz."""
        facts = {
            "format": CLASSIFIER_FORMAT,
            "labels": self.labels,
            "templates": self.templates,
            "model": asdict(self._embedder.identity),
        }
        buffer = io.BytesIO()
        np.savez(buffer, embeddings=self.embeddings, facts=np.array(json.dumps(facts)))
        write_bytes(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path, embedder: Embedder) -> Self:
        """What `save` wrote; the labels are not embedded again.

        Raises:
            InputError: there is no such file, it is damaged, or it belongs to another model than
                `embedder`.
        """
        labels, templates, saved, embeddings = _read(Path(path))
        if not saved.fits(embedder.identity):
            raise InputError(
                f"{path} holds labels embedded by {saved}, the pictures would be embedded by "
                f"{embedder.identity}; embed the labels again with this model"
            )
        loaded = cls.__new__(cls)
        loaded._embedder = embedder
        loaded.labels, loaded.templates = labels, templates
        loaded.embeddings = embeddings
        return loaded


def in_batches(
    classify: Callable[[Sequence[Picture]], Floats], images: Iterable[Picture], size: int
) -> Iterator[Floats]:
    """What `classify` says of `images`, `size` at a time; an error counts them all."""
    source, start = iter(images), 0
    while batch := list(itertools.islice(source, size)):
        try:
            yield classify(batch)
        except ImageError as error:
            raise error.shifted(start) from error
        start += len(batch)


def _read(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], ModelIdentity, Floats]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            facts, embeddings = json.loads(str(file["facts"])), file["embeddings"]
        if facts["format"] != CLASSIFIER_FORMAT:
            raise InputError(
                f"{path} is of format {facts['format']!r}, this version reads {CLASSIFIER_FORMAT}; "
                "save the classifier again"
            )
        model = ModelIdentity(**facts["model"])
        expected = (len(facts["labels"]), model.embed_dim)
        if embeddings.dtype != np.float32 or embeddings.shape != expected:
            raise ValueError(f"embeddings {embeddings.dtype} {list(embeddings.shape)}")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected what save() wrote") from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not a saved classifier, or is damaged ({error}); save it again"
        ) from error
    return tuple(facts["labels"]), tuple(facts["templates"]), model, embeddings


def read_templates(source: str) -> tuple[str, ...]:
    """Templates by name, see `TEMPLATES`, or from a UTF-8 file with one a line.

    Raises:
        InputError: there is neither such a name nor such a file, or the file is empty.
        TextError: it is not UTF-8.
    """
    if source in TEMPLATES:
        return TEMPLATES[source]
    if not Path(source).is_file():
        raise InputError(
            f"{source} is neither a file with a template a line nor one of the built-in sets: "
            f"{', '.join(TEMPLATES)}"
        )
    found = tuple(read_lines(Path(source)))
    if not found:
        raise InputError(
            f"{source} has no templates; expected one a line, such as 'a photo of {{}}'"
        )
    return found
