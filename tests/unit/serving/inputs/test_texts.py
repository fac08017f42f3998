"""Texts in all forms that people have, and truncation compared with OpenAI's tokenizer."""

import random
import time
from contextlib import suppress

import numpy as np
import pandas
import pytest

from serving.bundles.manifest import TextSpec
from serving.errors import TextError
from serving.inputs.texts import checked_text, decode_text, each_text
from serving.inputs.tokenizer import Tokenizer
from serving.limits import MAX_LINES, MAX_TEXT_BYTES, MAX_WORD
from tests.support.references import VOCABULARY
from tests.unit.serving.inputs.test_tokenizer import load_openai

SPEC = TextSpec(context_length=77, vocab_size=49408, start_id=49406, end_id=49407, pad_id=0)
CHINESE = "猫坐在红色的垫子上，看着窗外的雨。"


@pytest.fixture(scope="module")
def openai():
    return load_openai()


@pytest.fixture(scope="module")
def tokenize(tmp_path_factory):
    from export.checkpoints.vocabulary import openai_tokenizer

    path = tmp_path_factory.mktemp("bundle") / "tokenizer.json"
    openai_tokenizer(VOCABULARY).save(str(path))
    return Tokenizer(path, SPEC)


LONG = {
    "Chinese": CHINESE * 300,
    "Chinese with spaces": f"{CHINESE} " * 2000,
    "English": "a cat sat on the mat and looked at the rain. " * 5000,
    "one word": "cat" * 5000,
    "many lines": "two cats\n" * 5000,
    "many short lines": "a\n" * 150 + "b",
    "spaces first": " \n" * 20_000 + "a cat " * 100,
    "emoji": "🤷🏽‍♀️🏳️‍🌈 " * 2000,
    "emoji without spaces": "🐈🐕" * 5000,
    "HTML": "a &amp; b &lt;i&gt; " * 3000,
    "mixed": (f"{CHINESE}\ncafé ‘x’ &eacute; ") * 800,
    "accents": "naïve café " * 3000,
    "surrogate pairs": "\ud83d\ude00 cat " * 3000,
    "surrogate pairs without spaces": "\ud83d\ude00" * 3000,
    "short": "a cat",
    "75 words": "cat " * 75,
}


@pytest.mark.parametrize("kind", LONG)
def test_truncated_tokens_are_those_of_the_whole_text(kind, tokenize, openai):
    text = LONG[kind]
    expected = openai.encode(text.encode("utf-16", "surrogatepass").decode("utf-16"))[:75]
    ids = tokenize([text], truncate=True)[0].tolist()
    assert ids[: len(expected) + 2] == [49406, *expected, 49407]


def test_truncated_random_texts_equal_openais(tokenize, openai):
    rng = random.Random(0)
    pieces = [*CHINESE, "cat", "a", " ", " ", "\n", "é", "🐈", "&amp;", "1", "!?", "ＡＢ"]
    for _ in range(40):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(2000, 12_000)))
        ids = tokenize([text], truncate=True)[0].tolist()
        assert ids == [49406, *openai.encode(text)[:75], 49407]


def test_texts_over_a_limit_are_rejected_without_truncation(tokenize):
    for kind in ("Chinese", "English", "one word", "many lines"):
        with pytest.raises(TextError) as caught:
            tokenize([LONG[kind]])
        assert "more than" in caught.value.reason.lower()
    with pytest.raises(TextError):
        tokenize(["\x01" * 8000], truncate=True)  # nothing remains


def test_cut_text_is_within_every_limit():
    for text in LONG.values():
        cut = checked_text(text, truncate=True)
        assert checked_text(cut) == cut
        assert len(cut.encode()) <= MAX_TEXT_BYTES
        assert cut.count("\n") < MAX_LINES
        assert max(map(len, cut.split())) <= MAX_WORD
        assert (
            text.encode("utf-16", "surrogatepass")
            .decode("utf-16")
            .lstrip()
            .startswith(cut.lstrip())
        )


def test_work_on_a_truncated_text_is_bounded(tokenize):
    def seconds(text):
        begin = time.process_time()
        with suppress(TextError):
            tokenize([text], truncate=True)
        return time.process_time() - begin

    for unit in ("İ", "e\u0301\u0327", "&amp;amp;", "&#" + "9" * 4000 + ";", "<b>\n"):
        assert seconds(unit * (10_000_000 // len(unit))) < 2


def test_encoded_texts_are_cut_between_characters():
    for shift in range(4):
        text = "x" * shift + "猫" * 5000
        cut = decode_text(text.encode(), truncate=True)
        assert text.startswith(cut)
        assert len(cut) > 2700
    with pytest.raises(TextError) as caught:
        decode_text(b"\xff" * 10_000, truncate=True)
    assert "utf-8" in caught.value.reason.lower()
    with pytest.raises(TextError) as caught:
        decode_text("猫".encode()[:2], truncate=True)
    assert "utf-8" in caught.value.reason.lower()


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("a cat", ["a cat"]),
        (np.str_("a cat"), ["a cat"]),
        (("a", "b"), ["a", "b"]),
        (iter(["a", "b"]), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array(["a", "b"], dtype=object), ["a", "b"]),
        (pandas.Series(["a", "b"], index=[5, 3]), ["a", "b"]),
        (np.array("a"), ["a"]),
        ({"x": "a"}.values(), ["a"]),
        ([], []),
    ],
)
def test_every_form_of_texts(texts, expected):
    assert list(each_text(texts)) == expected


@pytest.mark.parametrize(
    "texts", [b"a cat", bytearray(b"a"), None, 7, {"a": "b"}, {"a"}, np.array([["a"]])]
)
def test_what_is_no_text_is_rejected(texts):
    with pytest.raises(TextError) as caught:
        list(each_text(texts))
    assert caught.value.reason


def test_missing_values_are_named_by_type():
    for missing, name in ((float("nan"), "float"), (None, "NoneType"), (pandas.NA, "NAType")):
        with pytest.raises(TextError) as caught:
            checked_text(list(each_text(pandas.Series(["a", missing], dtype=object)))[1])
        assert name in caught.value.reason
