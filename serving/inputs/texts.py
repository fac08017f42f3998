"""Texts in the forms that people have, and the checks before anything processes a text.

This module does not know how texts are tokenized (`serving.inputs.tokenizer`).
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import TypeAlias

import numpy as np

from serving.errors import TextError
from serving.limits import MAX_LINES, MAX_TEXT_BYTES, MAX_WORD

Texts: TypeAlias = str | Iterable[str]
"""One text, or an iterable of texts: a list, a generator, a column of a table, an array of str."""

_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1}}}")
_LINES = re.compile(rf"(?:[^\n]*\n){{{MAX_LINES}}}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONE_SURROGATE = re.compile(
    "[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]"
)


def each_text(texts: Texts, kind: str = "texts") -> Iterator[str]:
    """Yield the texts of an argument; a str is one text. `checked_text` checks each of them.

    Args:
        texts: the argument.
        kind: its name in errors.

    Raises:
        TextError: `texts` is neither a str nor an ordered iterable.
    """
    if isinstance(texts, str):
        return iter((texts,))
    if hasattr(texts, "__array__"):
        array = np.asarray(texts)
        if array.ndim > 1:
            raise TextError(
                f"expected one column of {kind}, got an array {array.dtype} {list(array.shape)}",
                advice="pass one column",
            )
        return iter(array.reshape(-1).tolist())
    unordered = isinstance(texts, Mapping | AbstractSet)
    if isinstance(texts, bytes | bytearray | memoryview) or not isinstance(texts, Iterable):
        raise TextError(f"expected {kind} to be str, got {type(texts).__name__}")
    if unordered:
        raise TextError(
            f"expected {kind} in an order, got a {type(texts).__name__}",
            advice="pass a list, such as list(texts.values())",
        )
    return iter(texts)


def checked_text(text: object, *, truncate: bool = False) -> str:
    """Return a text that is within the limits and can be encoded as UTF-8.

    Args:
        text: the text.
        truncate: cut a text that exceeds `MAX_TEXT_BYTES`, `MAX_LINES` or `MAX_WORD`.

    Raises:
        TextError: it is not a str, exceeds a limit, or has a NUL character or a lone surrogate.
    """
    if not isinstance(text, str):
        raise TextError(f"expected a str, got {type(text).__name__}")
    if truncate:
        text = _cut(text)
    _check_size(text)
    if "\0" in text:
        raise TextError(
            f"the text has a NUL character at position {text.index(chr(0))}", advice="remove it"
        )
    if _SURROGATE.search(text) is None:
        return text
    if surrogate := _LONE_SURROGATE.search(text):
        raise TextError(
            f"the text has a lone surrogate, {surrogate[0]!r}, at position {surrogate.start()}",
            advice="decode the text as UTF-8 and without 'surrogateescape'",
        )
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def decode_text(data: bytes, *, truncate: bool = False) -> str:
    """Decode a text received over the network.

    Args:
        data: the text in UTF-8.
        truncate: cut a text that exceeds `MAX_TEXT_BYTES`.

    Raises:
        TextError: the text is too long or not UTF-8.
    """
    whole = len(data) <= MAX_TEXT_BYTES
    if not whole and not truncate:
        raise _too_many_bytes(len(data))
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        return decoder.decode(data if whole else data.lstrip()[:MAX_TEXT_BYTES], final=whole)
    except UnicodeDecodeError as error:
        raise TextError(f"the text is not UTF-8: {error}") from error


def check_words(text: str) -> None:
    """Check the longest word of a text.

    Raises:
        TextError: it is longer than `MAX_WORD`.
    """
    longest = max(map(len, text.split()), default=0)
    if longest > MAX_WORD:
        raise TextError(
            f"the text has {longest} characters without whitespace, more than the {MAX_WORD} "
            "allowed",
            advice="shorten it",
        )


def cut_at_long_word(text: str) -> str:
    """Return the text up to the first `MAX_WORD` characters of a longer word."""
    found = _LONG_WORD.search(text)
    return text if found is None else text[: found.start() + MAX_WORD]


def _cut(text: str) -> str:
    """Return the beginning of a text that is within the limits."""
    if len(text) > MAX_TEXT_BYTES // 4:  # a character takes up to 4 bytes
        text = text.lstrip()[:MAX_TEXT_BYTES]
        data = text.encode("utf-8", "surrogatepass")
        if len(data) > MAX_TEXT_BYTES:
            end = MAX_TEXT_BYTES
            while data[end] & 0xC0 == 0x80:  # within a character
                end -= 1
            text = data[:end].decode("utf-8", "surrogatepass")
            if "\ud800" <= text[-1] <= "\udbff":  # the first half of a pair
                text = text[:-1]
    if text.count("\n") >= MAX_LINES:
        text = text.lstrip()
        if (lines := _LINES.match(text)) is not None:
            text = text[: lines.end() - 1]
    return cut_at_long_word(text)


def _check_size(text: str) -> None:
    """Check the limits on a text, before anything processes it character by character."""
    size = len(text)
    if size <= MAX_TEXT_BYTES and not text.isascii():
        size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_TEXT_BYTES:
        raise _too_many_bytes(size)
    if (lines := text.count("\n") + 1) > MAX_LINES:
        raise TextError(
            f"the text has {lines} lines, more than the {MAX_LINES} allowed",
            advice="join some of them",
        )
    check_words(text)


def _too_many_bytes(size: int) -> TextError:
    return TextError(
        f"the text has {size} bytes, more than the {MAX_TEXT_BYTES} allowed",
        advice="shorten it",
    )
