"""Ranking of texts for images, multiple-choice answers, and captions from a vocabulary.

    rank(embedder, ["cat.jpg"], ["a cat asleep", "a cat that hunts"])[0][0].text
    answer(embedder, "street.jpg", "the traffic light is", ["red", "green"])[0].probability
    caption(embedder, ["street.jpg"], read_vocabulary(Path("street.toml")))[0].text

The logit of a text is its cosine with the image times the logit scale of the checkpoint. OpenAI's
model and transformers' `CLIPModel` call it `logits_per_image`. The probability of a text is the
softmax over all texts that were ranked together. Probabilities are relative: a single text always
has probability 1, whatever the image shows.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import InputError, TextError, excerpt
from serving.inputs.images import ImageInput, Images
from serving.inputs.texts import each_text
from serving.tasks.embedder import Embedder, Floats
from serving.tasks.readable import Errors, all_in_batches
from serving.tasks.zero_shot import embed_labels, softmax
from serving.util.progress import Progress, silent
from serving.util.typed_json import parse_json

QUESTION_TEMPLATE = "{question} {answer}"
THRESHOLD = 0.5
SEPARATOR = ", "

_CHUNK = 64
"""Images embedded between two progress reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Similarity of a text and an image."""

    text: str
    cosine: float
    logit: float
    """The cosine times the logit scale of the checkpoint."""
    probability: float
    """Softmax over the logits of all texts that were ranked together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """Alternative words, such as colors, at most one of which is used in a caption."""

    name: str
    words: tuple[str, ...]
    templates: tuple[str, ...] | None = None
    """Prompt templates for the words. None: those of the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """Caption of an image, composed from a vocabulary."""

    text: str
    """The words that reached the threshold, joined. Empty if none did."""
    best: dict[str, Score]
    """The best word of each category, whether it reached the threshold or not."""


def rank(
    embedder: Embedder,
    images: Images,
    texts: Iterable[str],
    *,
    truncate: bool = False,
    errors: Errors | None = None,
    progress: Progress = silent,
) -> list[list[Score]]:
    """Rank `texts` for each of `images`.

    Args:
        embedder: `ClipClient` or `LocalClip`, entered.
        images: any number of images, or one; see `serving.inputs.images.ImageInput`.
        texts: distinct texts, at least one. They are embedded unchanged, without templates. A
            single str is an error.
        truncate: cut texts that are too long instead of raising an error.
        errors: receives the error of each image that cannot be used, by its index; the result then
            leaves these images out. None: such an error is raised.
        progress: receives the number of embedded images.

    Returns:
        For each image the scores of all texts, best first; texts with equal scores keep their
        order.

    Raises:
        ImageError: an image cannot be used; the error says which and why.
        TextError: there are no texts, or one of them is empty, too long or given twice.
    """
    choices = _choices(texts, "texts")
    embedded = embedder.embed_texts(choices, truncate=truncate)
    embeddings = _embed(embedder, images, embedded.shape[1], errors, progress)
    return _scores(embeddings, embedded, choices, embedder.logit_scale)


def answer(
    embedder: Embedder,
    image: ImageInput,
    question: str,
    candidates: Iterable[str],
    *,
    template: str = QUESTION_TEMPLATE,
) -> list[Score]:
    """Rank candidate answers to a question about an image.

    CLIP was trained on captions, so the start of a sentence works better than a question. A
    template such as `a photo of a {answer}` may omit the question.

    Args:
        embedder: `ClipClient` or `LocalClip`, entered.
        image: the image that the question is about.
        question: replaces `{question}` in the template.
        candidates: distinct answers, at least one; each replaces `{answer}` in the template.
        template: text to embed, with `{answer}` and optionally `{question}`.

    Returns:
        Scores, best first, whose texts are the candidates.

    Raises:
        ImageError: the image cannot be used.
        TextError: there are no candidates, one of them is empty or given twice, the template has
            no `{answer}`, or a text is too long.
    """
    if "{answer}" not in template:
        raise TextError(
            f"template {excerpt(template)} has no {{answer}} to replace with the candidates"
        )
    choices = _choices(candidates, "candidates")
    if not question.strip() and "{question}" in template:
        raise TextError(
            "the question is empty", advice="give one, or a template without {question}"
        )

    def filled(candidate: str) -> str:
        if not candidate.strip():
            raise TextError(f"a candidate is empty or only whitespace: {excerpt(candidate)}")
        values = {"{question}": question, "{answer}": candidate}
        return re.sub(r"\{question\}|\{answer\}", lambda found: values[found[0]], template)

    texts = {filled(candidate): candidate for candidate in choices}
    ranked = rank(embedder, [image], list(texts))[0]
    return [replace(score, text=texts[score.text]) for score in ranked]


def caption(
    embedder: Embedder,
    images: Images,
    vocabulary: Iterable[Category],
    *,
    threshold: float = THRESHOLD,
    separator: str = SEPARATOR,
    errors: Errors | None = None,
    progress: Progress = silent,
) -> list[Caption]:
    """Caption images with the best word of each category.

    Probabilities are relative to the other words of the category. They tell which word matches the
    image best, not whether any does: a category that may not apply needs a word for that case,
    such as `nothing`.

    Args:
        embedder: `ClipClient` or `LocalClip`, entered.
        images: any number of images, or one; see `serving.inputs.images.ImageInput`.
        vocabulary: categories, in the order of their words in the caption.
        threshold: minimum probability, 0 to 1, of a word in the caption.
        separator: text between two words.
        errors: see `rank`.
        progress: receives the number of embedded images.

    Raises:
        ImageError: an image cannot be used; the error says which and why.
        InputError: the threshold is not between 0 and 1.
        TextError: there are no categories, two have the same name, or words or templates cannot be
            used; the error names the category.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"expected a threshold from 0 to 1, got {threshold}")
    vocabulary = tuple(vocabulary)
    names = _choices([category.name for category in vocabulary], "categories")
    words = [_embed_words(embedder, category) for category in vocabulary]
    embeddings = _embed(embedder, images, words[0].shape[1], errors, progress)
    ranked = [
        _scores(embeddings, embedded, category.words, embedder.logit_scale)
        for category, embedded in zip(vocabulary, words, strict=True)
    ]
    captions = []
    for scores in zip(*ranked, strict=True):
        best = {name: score[0] for name, score in zip(names, scores, strict=True)}
        chosen = [score.text for score in best.values() if score.probability >= threshold]
        captions.append(Caption(text=separator.join(chosen), best=best))
    return captions


def read_vocabulary(file: Path) -> list[Category]:
    """Read the categories of a `.toml` or `.json` file, in the order of the file.

    A category is a list of words, or a table with `words` and `template`, which is one prompt
    template or a list of them:

        color = ["red", "green"]

        [shape]
        words = ["circle", "square"]
        template = "a {}"

    Raises:
        InputError: the file cannot be read, or does not have this form; the error says where.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": parse_json}
    if file.suffix.lower() not in readers:
        raise InputError(f"{file}: expected a vocabulary in a .toml or .json file")
    try:
        document = readers[file.suffix.lower()](text)
    except ValueError as error:  # the base class of both libraries' errors
        raise InputError(f"{file} is not valid {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(document, dict) or not document:
        raise InputError(f'{file}: expected categories, such as color = ["red", "green"]')
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
    raise InputError(f"{expected} to be a list of strings, got {excerpt(str(value))}")


def _embed_words(embedder: Embedder, category: Category) -> Floats:
    try:
        return embed_labels(embedder, category.words, category.templates)
    except TextError as error:
        raise error.within(f"category {category.name!r}") from error


def _embed(
    embedder: Embedder, images: Images, width: int, errors: Errors | None, progress: Progress
) -> Floats:
    """Embed images in chunks, reporting progress; return float32 [n, dim]."""
    return all_in_batches(
        embedder.embed_images,
        images,
        _CHUNK,
        errors,
        width=width,
        step="embedding images",
        progress=progress,
    )


def _scores(
    images: Floats, embedded: Floats, texts: Sequence[str], logit_scale: float
) -> list[list[Score]]:
    """Return for each image [n, dim] the scores of all texts [texts, dim], best first."""
    cosines = images @ embedded.T
    logits = np.float32(logit_scale) * cosines
    probabilities, order = softmax(logits), np.argsort(-cosines, axis=1, kind="stable")
    return [
        [
            Score(
                text=texts[index],
                cosine=float(cosines[row, index]),
                logit=float(logits[row, index]),
                probability=float(probabilities[row, index]),
            )
            for index in indices
        ]
        for row, indices in enumerate(order)
    ]


def _choices(texts: Iterable[str], kind: str) -> list[str]:
    """Return distinct texts as a list. The tokenizer checks each of them.

    Raises:
        TextError: `texts` is one str or has no order, or they are none or not distinct.
    """
    if isinstance(texts, str):
        raise TextError(
            f"expected a list of {kind}, got one str", advice=f"pass [{excerpt(texts)}]"
        )
    choices = list(each_text(texts, kind))
    if not choices:
        raise TextError(f"no {kind} to choose from", advice="give at least one")
    seen: set[str] = set()
    for text in choices:
        if not isinstance(text, str):
            raise TextError(f"expected {kind} to be str, got {type(text).__name__}")
        if text in seen:
            raise TextError(f"{excerpt(text)} is given more than once; {kind} must differ")
        seen.add(text)
    return choices
