"""Free texts ranked for pictures, and what follows from that: answers to multiple-choice questions,
captions put together from a vocabulary.

    rank(embedder, ["cat.jpg"], ["a cat asleep", "a cat that hunts"])[0][0].text
    answer(embedder, "street.jpg", "the traffic light is", ["red", "green"])[0].probability
    caption(embedder, ["street.jpg"], read_vocabulary(Path("street.toml")))[0].text

A text's logit is its cosine to the picture times the checkpoint's scale, `logits_per_image` of
OpenAI's model and of transformers' `CLIPModel`; its probability is the softmax over the texts that
it was ranked among. A probability compares: that of a single text is 1, whatever the picture shows.
"""

import json
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from serving.errors import ImageError, InputError, TextError
from serving.inputs.preprocess import Picture
from serving.tasks.embedder import Embedder, Floats
from serving.tasks.zero_shot import embed_labels, softmax
from serving.util.progress import Progress, silent

QUESTION_TEMPLATE = "{question} {answer}"
THRESHOLD = 0.5
SEPARATOR = ", "

_CHUNK = 64  # pictures embedded between two reports of progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well a text fits a picture."""

    text: str
    cosine: float
    logit: float
    """The cosine times the checkpoint's scale."""
    probability: float
    """Softmax of the logits of all texts that were ranked together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """Words of which at most one goes into a caption, such as colours."""

    name: str
    words: tuple[str, ...]
    templates: tuple[str, ...] | None = None
    """What words are put into before they are embedded; None: the checkpoint's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """What a vocabulary says of a picture."""

    text: str
    """The words that reached the threshold, joined; empty where none did."""
    best: dict[str, Score]
    """The best word of each category, whether it reached the threshold or not."""


def rank(
    embedder: Embedder,
    images: Sequence[Picture],
    texts: Sequence[str],
    *,
    truncate: bool = False,
    progress: Progress = silent,
) -> list[list[Score]]:
    """The scores of all `texts` for each of `images`, best first; of equals the earlier text.

    Args:
        embedder: `ClipClient` or `LocalClip`, entered.
        images: at least one.
        texts: at least one, that differ; they are embedded as they are, without templates.
        truncate: cut texts that are too long instead of refusing them.
        progress: told how many of the pictures are embedded.

    Raises:
        ImageError: a picture cannot be used; the message says which and why.
        TextError: no texts, the same one twice, an empty one, or one that is too long.
    """
    _refuse(texts, "texts")
    embedded = embedder.embed_texts(texts, truncate=truncate)
    return _scores(_embed(embedder, images, progress), embedded, texts, embedder.logit_scale)


def answer(
    embedder: Embedder,
    image: Picture,
    question: str,
    candidates: Sequence[str],
    *,
    template: str = QUESTION_TEMPLATE,
) -> list[Score]:
    """The scores of `candidates` as answers to a question about a picture, best first.

    CLIP was trained on captions: a beginning of a sentence serves better than a question, and a
    template such as `a photo of a {answer}` may leave the question out.

    Args:
        template: how the two are put together, with `{answer}`, and `{question}` where it goes.

    Returns:
        Scores whose texts are the candidates.

    Raises:
        ImageError: the picture cannot be used.
        TextError: no candidates, the same one twice, an empty one, a template without `{answer}`,
            or a text that is too long.
    """
    if "{answer}" not in template:
        raise TextError(f"template {template!r} has no {{answer}} for the candidate to go")
    _refuse(candidates, "candidates")
    if not question.strip() and "{question}" in template:
        raise TextError("the question is empty; give one, or a template without {question}")

    def filled(candidate: str) -> str:
        if not candidate.strip():
            raise TextError(f"a candidate is empty or only whitespace: {candidate!r}")
        values = {"{question}": question, "{answer}": candidate}
        return re.sub(r"\{question\}|\{answer\}", lambda found: values[found[0]], template)

    texts = {filled(candidate): candidate for candidate in candidates}
    ranked = rank(embedder, [image], list(texts))[0]
    return [replace(score, text=texts[score.text]) for score in ranked]


def caption(
    embedder: Embedder,
    images: Sequence[Picture],
    vocabulary: Sequence[Category],
    *,
    threshold: float = THRESHOLD,
    separator: str = SEPARATOR,
    progress: Progress = silent,
) -> list[Caption]:
    """The best word of each category for each picture, joined where its probability is enough.

    A probability is a share among the words of a category. It tells which of them fits best, not
    whether any does: a category that may not apply needs a word for that, such as `nothing`.

    Args:
        vocabulary: in the order in which words are joined.
        threshold: least probability, 0 to 1, of a word that is put into the caption.
        separator: between words.
        progress: told how many of the pictures are embedded.

    Raises:
        ImageError: a picture cannot be used; the message says which and why.
        InputError: the threshold is not between 0 and 1.
        TextError: no categories, two of one name, or words or templates that cannot be used; the
            message says of which category.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"expected a threshold from 0 to 1, a probability; got {threshold}")
    _refuse([category.name for category in vocabulary], "categories")
    words = [_embed_words(embedder, category) for category in vocabulary]
    pictures = _embed(embedder, images, progress)
    ranked = [
        _scores(pictures, embedded, category.words, embedder.logit_scale)
        for category, embedded in zip(vocabulary, words, strict=True)
    ]
    names = [category.name for category in vocabulary]
    captions = []
    for scores in zip(*ranked, strict=True):
        best = {name: score[0] for name, score in zip(names, scores, strict=True)}
        chosen = [score.text for score in best.values() if score.probability >= threshold]
        captions.append(Caption(text=separator.join(chosen), best=best))
    return captions


def read_vocabulary(file: Path) -> list[Category]:
    """The categories of a `.toml` or `.json` file, in its order.

    A category is a list of words, or a table of `words` and `template`, one or a list:

        colour = ["red", "green"]

        [shape]
        words = ["circle", "square"]
        template = "a {}"

    Raises:
        InputError: the file cannot be read, or is not of this form; the message says where.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    readers = {".toml": tomllib.loads, ".json": json.loads}
    if file.suffix.lower() not in readers:
        raise InputError(f"{file}: expected a vocabulary in a .toml or .json file")
    try:
        document = readers[file.suffix.lower()](text)
    except ValueError as error:  # of both libraries
        raise InputError(f"{file} is no {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(document, dict) or not document:
        raise InputError(f'{file}: expected categories, such as colour = ["red", "green"]')
    return [_category(file, name, content) for name, content in document.items()]


def _category(file: Path, name: str, content: object) -> Category:
    table = content if isinstance(content, dict) else {"words": content}
    if unknown := sorted(table.keys() - {"words", "template"}):
        raise InputError(
            f"{file}, category {name!r}: expected `words` and `template`, got {unknown[0]!r}"
        )
    templates = table.get("template")
    if templates is not None:
        listed = [templates] if isinstance(templates, str) else templates
        templates = _strings(listed, f"{file}, category {name!r}: expected template")
    words = _strings(table.get("words"), f"{file}, category {name!r}: expected words")
    return Category(name=name, words=words, templates=templates)


def _strings(value: object, expected: str) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise InputError(f"{expected} to be a list of strings, got {value!r}")


def _embed_words(embedder: Embedder, category: Category) -> Floats:
    try:
        return embed_labels(embedder, category.words, category.templates)
    except TextError as error:
        raise error.within(f"category {category.name!r}") from error


def _embed(embedder: Embedder, images: Sequence[Picture], progress: Progress) -> Floats:
    """All pictures, float32 [n, dim], in chunks between which `progress` is told."""
    if isinstance(images, str | bytes | os.PathLike):
        raise ImageError(f"expected a sequence of pictures, got one {type(images).__name__}")
    if not len(images):
        raise ImageError("no pictures to rank for; give at least one")
    parts = []
    for start in range(0, len(images), _CHUNK):
        progress("embedding images", start, len(images))
        try:
            parts.append(embedder.embed_images(images[start : start + _CHUNK]))
        except ImageError as error:
            raise error.shifted(start) from error
    return np.concatenate(parts)


def _scores(
    images: Floats, embedded: Floats, texts: Sequence[str], logit_scale: float
) -> list[list[Score]]:
    """[n, dim] and [texts, dim] -> for each picture all texts, best first."""
    cosines = images @ embedded.T
    logits = np.float32(logit_scale) * cosines
    shares, order = softmax(logits), np.argsort(-cosines, axis=1, kind="stable")
    return [
        [
            Score(
                text=texts[index],
                cosine=float(cosines[row, index]),
                logit=float(logits[row, index]),
                probability=float(shares[row, index]),
            )
            for index in indices
        ]
        for row, indices in enumerate(order)
    ]


def _refuse(texts: Sequence[str], kind: str) -> None:
    """What cannot be chosen from; single texts are judged where they are tokenized."""
    if isinstance(texts, str):
        raise TextError(f"expected a list of {kind}, got one str; pass [{texts!r}]")
    if not texts:
        raise TextError(f"no {kind} to choose from; give at least one")
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise TextError(f"{text!r} is given more than once; {kind} must differ")
        seen.add(text)
