"""Tokenize texts as OpenAI's tokenizer does, padded to a length bucket.

The rules are those of `clip/simple_tokenizer.py` and `clip/clip.py:tokenize`. `clean` does all
normalization; the file `tokenizer.json` provides the split into words, the vocabulary and the
merges. Two rules differ from OpenAI's. Likely mistakes raise an error: an empty text, a NUL
character and a lone surrogate. And a literal `<|endoftext|>` in a text is ordinary text, not a
special token.
"""

import html
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import ftfy
import numpy as np
import tokenizers
from ftfy.fixes import unescape_html
from numpy.typing import NDArray

from serving.bundles.manifest import TextSpec
from serving.errors import BundleError, TextError, TextTooLongError, excerpt
from serving.inputs.texts import check_words, checked_text, cut_at_long_word
from serving.limits import MAX_UNESCAPES

T = TypeVar("T")
U = TypeVar("U")

START = "<|startoftext|>"
END = "<|endoftext|>"

_RUN_TOKENS = 16
"""Fixed cost of one run of the text tower, expressed as a number of tokens. Measured with ViT-B/32
on two CPUs (1 text of 16 tokens against 32): 6 for onnxruntime:fp32, 40 for onnxruntime:int8."""

_WHITESPACE = re.compile(r"\s+")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


def clean(text: str, *, truncate: bool = False) -> str:
    """Repair a text, unescape HTML, collapse whitespace and lower-case it, in OpenAI's order.

    Source: `basic_clean`, `whitespace_clean` and `encode` in `clip/simple_tokenizer.py`.

    Args:
        text: a text within the limits.
        truncate: cut the repaired text before a word becomes too long.

    Raises:
        TextError: the repair takes more than `MAX_UNESCAPES` rounds, or the repaired text has a
            word that is too long.
    """
    # ftfy changes nothing in printable ASCII except HTML entities, and takes most of the time.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        text = html.unescape(html.unescape(_repaired(text, truncate)))
    return _WHITESPACE.sub(" ", text.strip()).strip().lower()


def _repaired(text: str, truncate: bool) -> str:
    """Return the result of `ftfy.fix_text`, computed in a bounded number of rounds.

    ftfy repeats until nothing changes, which takes quadratic time for nested HTML entities
    (`&amp;amp;...`). As in ftfy, lines are repaired one by one, and HTML is not unescaped from the
    first line with a `<` on.
    """
    repaired, unescaping = [], True
    for line in _LINE.findall(text):
        unescaping = unescaping and "<" not in line
        repaired.append(_repaired_line(line) if unescaping else _fixed(line))
    result = "".join(repaired)
    # Again, because ftfy removes control characters, some of which are whitespace.
    if truncate:
        return cut_at_long_word(result)
    check_words(result)
    return result


def _repaired_line(line: str) -> str:
    for _ in range(MAX_UNESCAPES + 1):
        before, line = line, _fixed(unescape_html(line))
        if line == before or "&" not in line:
            return line
    raise TextError(
        f"the text has HTML that was escaped more than {MAX_UNESCAPES} times",
        advice="unescape it first",
    )


def _fixed(line: str) -> str:
    result: str = ftfy.fix_text_segment(line, unescape_html=False)
    return result


class Tokenizer:
    """Tokenizer that converts texts to the input ids of a text tower.

    Args:
        path: a `tokenizer.json` of CLIP's type: byte-level BPE with `</w>`, with any vocabulary.
        spec: the text tower that it belongs to.

    Raises:
        BundleError: the file is missing, unreadable, or belongs to a different model than `spec`.
    """

    def __init__(self, path: str | os.PathLike[str], spec: TextSpec) -> None:
        self._spec = spec
        self._backend = _load(Path(path), spec)

    def __call__(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.int32]:
        """Tokenize texts.

        Args:
            texts: at least one text.
            truncate: truncate texts that exceed the context length or a limit, keeping the
                end-of-text token, instead of raising; see `encode`.

        Returns:
            int32 [len(texts), length]: start-of-text, text, end-of-text, padding. `length` is the
            smallest of `spec.buckets` that holds the longest text.

        Raises:
            TextError: see `encode`.
        """
        rows = self.encode(texts, truncate=truncate)
        return self.padded(rows, self.bucket(max(map(len, rows))))

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> list[list[int]]:
        """Tokenize texts without padding them: start-of-text, text, end-of-text.

        With `truncate`, a text over a limit of `serving.limits` is cut to the limit before it is
        cleaned. The remaining tokens are those of the whole text, with three exceptions: ftfy
        repairs a line by all of its characters, so a line that was cut may be repaired differently;
        a word that was cut may be split into other tokens near its end; and if almost nothing
        within the limit becomes a token, such as 8 KiB of control characters, later words are lost.

        Raises:
            TextError: a text is empty, too long, not a `str`, or has a character that cannot be
                tokenized. The error has the index of the text.
        """
        if isinstance(texts, str):
            raise TextError(
                "expected a list of texts, got one str", advice=f"pass [{excerpt(texts)}]"
            )
        if not len(texts):
            raise TextError("expected at least one text, got none")
        try:
            cleaned = each("texts", texts, lambda text: _cleaned(text, truncate))
        except TextError as error:
            if error.index:  # an earlier text may have too many tokens
                self.encode(texts[: error.index], truncate=truncate)
            raise
        encodings = self._backend.encode_batch_fast(cleaned, add_special_tokens=False)
        pairs = list(zip(encodings, cleaned, strict=True))
        return each("texts", pairs, lambda pair: self._row(pair[0].ids, pair[1], truncate))

    def bucket(self, length: int) -> int:
        """Return the smallest of `spec.buckets` that holds `length` tokens."""
        return next(bucket for bucket in self._spec.buckets if bucket >= length)

    def padded(self, rows: Sequence[Sequence[int]], length: int) -> NDArray[np.int32]:
        """Pad rows of `encode`, none longer than `length`, to int32 [len(rows), length]."""
        ids = np.full((len(rows), length), self._spec.pad_id, np.int32)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = row
        return ids

    def _row(self, body: list[int], text: str, truncate: bool) -> list[int]:
        """Add start and end to a text's ids, which must fit and contain neither of them."""
        spec = self._spec
        if not body or spec.end_id in body or spec.start_id in body:
            raise self._unknown(text)
        if len(body) + 2 > spec.context_length:
            if not truncate:
                raise TextTooLongError(
                    f"the text has {len(body) + 2} tokens, start and end included, more than the "
                    f"model's {spec.context_length}: {excerpt(text)}",
                    advice="shorten it, or enable truncation",
                )
            body = body[: spec.context_length - 2]
        return [spec.start_id, *body, spec.end_id]

    def _unknown(self, text: str) -> TextError:
        """Return the error for characters that a vocabulary without all 256 bytes cannot encode."""
        # The tokenizer emits the unknown token for them, which for CLIP is end-of-text. The text
        # tower would pool there and ignore the rest of the text.
        encoding = self._backend.encode(text, add_special_tokens=False)
        special = (self._spec.start_id, self._spec.end_id)
        spans = [
            span
            for token, span in zip(encoding.ids, encoding.offsets, strict=True)
            if token in special
        ]
        pieces = sorted({text[start:stop] for start, stop in spans}) or [text]
        listed = ", ".join(excerpt(piece) for piece in pieces[:5])
        return TextError(
            f"the text has characters outside this model's vocabulary: {listed}",
            advice=f"remove them from {excerpt(text)}",
        )


def batches_by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield the indices of `rows` in batches of up to `size`, shortest rows first.

    A tower's time is proportional to the padded length, so batches of similar lengths waste least.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def batches_by_beginning(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield the indices of `rows` in batches of up to `size`, with shared prefixes adjacent.

    For prefix trees, which compute shared prefixes once (`serving.inputs.prefix_tree`).
    """
    order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def runs_by_length(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Group arrays of token ids, each group to be padded to one length and run as one batch.

    A shorter array joins a longer one if its padding costs less than a separate run.

    Args:
        shapes: number of texts and length of each array.

    Returns:
        Groups of indices of `shapes`, shortest first; the last array of a group is the longest.
    """
    groups: list[list[int]] = []
    texts = length = 0
    for index in sorted(range(len(shapes)), key=lambda index: shapes[index][1]):
        if not groups or texts * (shapes[index][1] - length) > _RUN_TOKENS:
            groups.append([])
            texts = 0
        groups[-1].append(index)
        texts, length = texts + shapes[index][0], shapes[index][1]
    return groups


def _load(path: Path, spec: TextSpec) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise BundleError(
            f"{path}: no such file, expected a tokenizer.json", advice="export the model again"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(
            f"{path} is not a tokenizer.json ({error})", advice="export the model again"
        ) from error
    for token, expected in ((START, spec.start_id), (END, spec.end_id)):
        found = backend.token_to_id(token)
        if found != expected:
            raise BundleError(
                f"{path} and the manifest belong to different models: {token} is {found} in the "
                f"file and {expected} in the manifest",
                advice="export the model again",
            )
    entries = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    if entries > spec.vocab_size:
        raise BundleError(
            f"{path} has {entries} entries, the text tower only {spec.vocab_size}: they belong to "
            "different models",
            advice="export the model again",
        )
    backend.no_padding()
    backend.no_truncation()
    # `clean` has already normalized the text. The NFC normalizer in transformers' files would
    # compose accents that html.unescape and lower() add after ftfy; OpenAI's tokenizer does not.
    backend.normalizer = None
    backend.encode_special_tokens = True  # a user's "<|endoftext|>" must not end the text
    return backend


def _cleaned(text: object, truncate: bool) -> str:
    """Clean a text, after checking its type, its size and its characters."""
    checked = checked_text(text, truncate=truncate)
    cleaned = clean(checked, truncate=truncate)
    if not cleaned:
        raise TextError(
            f"the text is empty or only whitespace: {excerpt(checked)}",
            advice="give it words",
        )
    return cleaned


def each(kind: str, items: Iterable[T], convert: Callable[[T], U]) -> list[U]:
    """Convert every item of the argument `kind`.

    Raises:
        TextError: an item cannot be converted; the error has the item's index.
    """
    converted = []
    for index, item in enumerate(items):
        try:
            converted.append(convert(item))
        except TextError as error:
            raise error.at(kind, index) from error
    return converted
