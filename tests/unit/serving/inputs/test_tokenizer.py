"""Token ids compared with OpenAI's tokenizer and transformers', and invalid texts."""

import gzip
import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from export.checkpoints.vocabulary import openai_tokenizer
from serving.bundles.manifest import TextSpec
from serving.errors import BundleError, CheckpointError, TextError, TextTooLongError
from serving.inputs.tokenizer import END, START, Tokenizer, clean, runs_by_length

SPEC = TextSpec(context_length=77, vocab_size=49408, start_id=49406, end_id=49407, pad_id=0)
PACKAGE = Path(importlib.util.find_spec("clip").submodule_search_locations[0])
BPE = PACKAGE / "bpe_simple_vocab_16e6.txt.gz"

PLAIN = (
    "a photo of a cat",
    "A Photo of a Dog.",
    "it's the dogs' ball, they've lost; I'm sure we'll find it",
    "DON'T SHOUT, I'D SAY YOU'RE RIGHT",
    "12 angry men, 1999; 3.14",
    "x" * 60,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "hello!!! (what?) [no] {yes} #tag @you a_b-c/d\\e $5 50% a=b",
    "naïve café, Ångström, Łódź",
    "фотография кота",
    "猫の写真、东京 사진",
    "a 😀 and a 👩‍👩‍👧",
)

ODD = (
    "fish &amp; chips &lt;b&gt; &quot;x&quot;",
    "doubly &amp;amp; escaped &amp;lt;i&amp;gt;",
    "<b>doubly &amp;lt;i&amp;gt; escaped where ftfy leaves entities alone",
    "&eacute;t&eacute; &#233; &#xe9;",
    "&#0; &#128; &#xD800; &bogus; &amp",
    "e&amp;#769; stays apart",
    "<p>e&#769;</p>",
    "mojibake: cafÃ© and â€œquotesâ€\x9d â€” dash",
    "“curly” ‘quotes’ and ‘it’s’",
    "tabs\tand\nnew\r\nlines\x0b\x0cand   many     spaces   ",
    "no\u00a0break thin\u2009em\u2003ideographic\u3000line\u2028para\u2029nel\x85end",
    "zero\u200bwidth \ufeffbom word\u2060joiner soft\u00adhyphen",
    "control\x01\x07\x1b[31m\x1c\x1d\x1e\x1fcharacters\x7f",
    "cafe\u0301 a\u030a \u1e9b\u0323 \u0301lonely",
    "İstanbul ΟΔΟΣ ẞtraße ǅ ﬁne ﬂow",
    "１２３ ½ Ⅷ ² ١٢٣ ㊿",
    "🤷🏽‍♀️🏳️‍🌈 ☃︎ ♥",
    "\ud83d\ude00 from a surrogate pair",
    "हिन्दी ภาษาไทย עברית العربية",
    "'s 's' ''s 'S 'T 'LL 'x don''t '' '",
    "<|notspecial|> <| endoftext |> |>",
    "...!!!???---___===",
    "a.b,c;d:e!f?g",
    "\u212bngstr\u00f6m \u212a",
    "y" * 1000,
)


def load_openai():
    """OpenAI's tokenizer, loaded by path because `import clip` needs torchvision."""
    location = PACKAGE / "simple_tokenizer.py"
    spec = importlib.util.spec_from_file_location("simple_tokenizer", location)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(BPE))


@pytest.fixture(scope="module")
def openai():
    return load_openai()


@pytest.fixture(scope="module")
def built():
    return openai_tokenizer(BPE)


@pytest.fixture(scope="module")
def path(built, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "tokenizer.json"
    built.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenize(path):
    return Tokenizer(path, SPEC)


@pytest.fixture(scope="module")
def tokenize_long(path):
    return Tokenizer(path, replace(SPEC, context_length=4000))


@pytest.fixture(scope="module")
def small_path(tmp_path_factory):
    """A tokenizer trained on a few captions, which cannot represent every byte."""
    backend = Backend(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=120,
        special_tokens=[START, END],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(["a red circle", "a blue square", "two green stars"] * 3, trainer)
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    backend.save(str(path))
    return path


def body(ids):
    """The ids between the start token and the first end token."""
    ids = ids.tolist()
    assert ids[0] == SPEC.start_id
    stop = ids.index(SPEC.end_id)
    assert set(ids[stop + 1 :]) <= {SPEC.pad_id}
    return ids[1:stop]


def mixtures(count):
    rng = random.Random(0)
    pieces = " ".join((*PLAIN, *ODD[:-1])).split(" ")
    for _ in range(count):
        glue = rng.choice(("", " ", "  ", "\n", "'", "-"))
        yield "a" + glue.join(rng.choice(pieces) for _ in range(rng.randint(1, 6)))


@pytest.mark.parametrize("text", [*PLAIN, *ODD], ids=ascii)
def test_ids_equal_openais(text, tokenize_long, openai):
    assert body(tokenize_long([text])[0]) == openai.encode(text)


def test_ids_of_random_mixtures_equal_openais(tokenize_long, openai):
    texts = list(mixtures(500))
    for text, ids in zip(texts, tokenize_long(texts), strict=True):
        assert body(ids) == openai.encode(text), ascii(text)


def test_ids_equal_transformers_on_plain_texts(built, tokenize):
    state = json.loads(built.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    reference = CLIPTokenizer(vocab=state["vocab"], merges=merges)
    for text in PLAIN:
        ids = tokenize([text])[0]
        assert [SPEC.start_id, *body(ids), SPEC.end_id] == reference(text)["input_ids"], text


def test_ids_of_hello_world(tokenize):
    # The ids are from OpenAI's notebook "Interacting with CLIP".
    assert tokenize(["Hello World!"]).tolist() == [[49406, 3306, 1002, 256, 49407, 0, 0, 0]]


def test_the_built_vocabulary_is_openais(built, openai):
    assert built.get_vocab_size() == 49408
    assert built.get_vocab() == openai.encoder


def test_the_saved_file_adds_start_and_end_by_itself(built):
    assert built.encode("a cat").ids == [49406, 320, 2368, 49407]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A\t\tB \n", "a b"),
        ("&amp;lt;B&amp;gt;", "<b>"),
        ("cafÃ©", "café"),
        ("‘x’", "'x'"),
        ("\u3000\u2003", ""),
    ],
)
def test_texts_are_cleaned(text, expected):
    assert clean(text) == expected


@pytest.mark.parametrize(
    ("words", "length"), [(1, 8), (6, 8), (7, 16), (14, 16), (15, 24), (46, 48), (47, 77), (75, 77)]
)
def test_batch_is_padded_to_the_smallest_sufficient_bucket(words, length, tokenize):
    ids = tokenize(["cat", " ".join(["cat"] * words)])
    assert ids.dtype == np.int32
    assert ids.shape == (2, length)
    assert ids[0].tolist() == [49406, 2368, 49407] + [0] * (length - 3)
    assert body(ids[1]) == [2368] * words


def test_padding_id_comes_from_the_spec(path):
    ids = Tokenizer(path, replace(SPEC, pad_id=49407))(["cat"])
    assert ids.tolist() == [[49406, 2368] + [49407] * 6]


def test_padding_and_truncation_of_the_file_are_ignored(built, tmp_path):
    other = Backend.from_str(built.to_str())
    other.enable_padding(length=50, pad_id=5)
    other.enable_truncation(4)
    other.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer(tmp_path / "tokenizer.json", SPEC)(["cat", "cat " * 9])
    assert [len(body(row)) for row in ids] == [1, 9]


def test_literal_special_token_is_plain_text(tokenize):
    ids = tokenize([f"a {END} cat {START} b", "a cat"])
    assert (ids == SPEC.end_id).sum(axis=1).tolist() == [1, 1]
    assert (ids == SPEC.start_id).sum(axis=1).tolist() == [1, 1]
    assert 2368 in body(ids[0])


def test_long_text_is_rejected_or_truncated_on_request(tokenize, openai):
    text = "cat " * 80
    with pytest.raises(
        TextTooLongError, match=r"the text has 82 tokens.* 77: 'cat cat.*; .*or enable truncation$"
    ):
        tokenize([text])
    with pytest.raises(TextTooLongError, match=r"^texts\[1\]: the text has 78 tokens") as caught:
        tokenize(["cat", "cat " * 76])
    assert (caught.value.kind, caught.value.index) == ("texts", 1)
    ids = tokenize([text, "cat"], truncate=True)
    assert ids.shape == (2, 77)
    assert ids[0].tolist() == [49406, *openai.encode(text)[:75], 49407]
    assert tokenize(["cat " * 75], truncate=True).tolist() == tokenize(["cat " * 75]).tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty or only whitespace: ''"),
        (" \n\t\u3000", "empty or only whitespace"),
        ("&nbsp;", "empty or only whitespace: '&nbsp;'"),
        ("ab\0c", "NUL character at position 2"),
        ("abc\ud800", r"a lone surrogate, '\\ud800', at position 3"),
        ("\udc00\ud800", r"a lone surrogate, '\\udc00', at position 0"),
        (b"cat", "expected a str, got bytes"),
        (None, "expected a str, got NoneType"),
    ],
    ids=ascii,
)
def test_invalid_text_is_rejected(text, message, tokenize):
    for before in ([], ["cat", "dog"]):
        with pytest.raises(TextError, match=message) as caught:
            tokenize([*before, text])
        assert (caught.value.kind, caught.value.index) == ("texts", len(before))
        assert str(caught.value).startswith(f"texts[{len(before)}]: ")


def test_no_texts_and_a_bare_string_are_rejected(tokenize):
    with pytest.raises(TextError, match="at least one text, got none"):
        tokenize([])
    with pytest.raises(TextError, match=r"got one str; pass \['cat'\]"):
        tokenize("cat")


def small_spec(path, **changes):
    entries = Backend.from_file(str(path)).get_vocab_size()
    small = TextSpec(context_length=20, vocab_size=entries, start_id=0, end_id=1, pad_id=1)
    return replace(small, **changes)


def test_small_vocabulary_encodes_its_own_words(small_path):
    tokenize = Tokenizer(small_path, small_spec(small_path))
    ids = tokenize(["a red square", "Two Blue Stars"])
    assert ids.shape[1] in (8, 16, 20)
    assert (ids[:, 0] == 0).all()
    for row in ids.tolist():
        stop = row.index(1)
        assert stop > 3
        assert set(row[stop:]) == {1}


def test_characters_outside_a_small_vocabulary_are_named(small_path):
    tokenize = Tokenizer(small_path, small_spec(small_path))
    with pytest.raises(TextError, match=r"^texts\[1\]: .* outside .*: 'x', 'z'; remove"):
        tokenize(["a red circle", "a red zx circle"])
    with pytest.raises(TextError, match="outside this model's vocabulary"):
        tokenize(["猫"])


def test_mismatched_tokenizer_file_is_rejected(path, small_path, tmp_path):
    with pytest.raises(BundleError, match=r"missing\.json: no such file"):
        Tokenizer(tmp_path / "missing.json", SPEC)
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(BundleError, match=r"broken\.json is not a tokenizer\.json"):
        Tokenizer(broken, SPEC)
    with pytest.raises(BundleError, match=r"startoftext\|> is 0 in the file and 49406 in the mani"):
        Tokenizer(small_path, SPEC)
    with pytest.raises(BundleError, match=r"endoftext\|> is 49407 in the file and 2 in the mani"):
        Tokenizer(path, replace(SPEC, end_id=2))
    with pytest.raises(BundleError, match="has 49408 entries, the text tower only 1000"):
        Tokenizer(path, replace(SPEC, vocab_size=1000))
    Tokenizer(path, replace(SPEC, vocab_size=50000))


def vocabulary_lines():
    with gzip.open(BPE, "rt", encoding="utf-8") as file:
        return file.read().split("\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain text", "cannot be read .*expected OpenAI's bpe_simple_vocab_16e6"),
        (BPE.read_bytes()[:5000], "cannot be read"),
        (gzip.compress(b"\xff\xfe\xff"), "cannot be read"),
        (gzip.compress(b"#version: 0.2\na b\nc d"), "has 3 lines and starts with '#version: 0.2'"),
        (gzip.compress(b"x\n" * 60000), "has 60001 lines and starts with 'x'"),
        (gzip.compress(b"#version\n" + b"a b\n" * 9 + b"a b c\n" * 60000), "line 11 is not a pair"),
    ],
    ids=["not gzip", "truncated", "not utf-8", "short", "no header", "no pairs"],
)
def test_wrong_vocabulary_file_is_rejected(content, message, tmp_path):
    wrong = tmp_path / "wrong.txt.gz"
    wrong.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        openai_tokenizer(wrong)


def test_a_missing_vocabulary_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.gz: no such file"):
        openai_tokenizer(tmp_path / "nowhere.gz")


@pytest.mark.parametrize(
    ("replacement", "message"),
    [("i n", "repeats an entry"), ("zq qz", "its merges are inconsistent .*zq")],
)
def test_damaged_vocabulary_is_rejected(replacement, message, tmp_path):
    lines = vocabulary_lines()
    assert lines[1] == "i n"
    lines[2] = replacement
    wrong = tmp_path / "wrong.txt.gz"
    wrong.write_bytes(gzip.compress("\n".join(lines).encode(), compresslevel=1))
    with pytest.raises(CheckpointError, match=message):
        openai_tokenizer(wrong)


@pytest.mark.parametrize(
    ("shapes", "groups"),
    [
        ([], []),
        ([(1, 77)], [[0]]),
        ([(1, 77), (1, 8), (1, 77)], [[1], [0, 2]]),  # 69 padding tokens exceed a run
        ([(1, 16), (2, 8)], [[1, 0]]),  # 16 padding tokens equal a run
        ([(1, 16), (3, 8)], [[1], [0]]),
        ([(1, 24), (1, 8), (1, 16)], [[1, 2, 0]]),  # merged step by step
    ],
)
def test_batches_of_similar_length_are_merged(shapes, groups):
    assert runs_by_length(shapes) == groups
