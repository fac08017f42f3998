"""Tokenizers in CLIP's format, from OpenAI's vocabulary file, a `tokenizer.json` or a vocabulary.

The saved `tokenizer.json` has the form that transformers uses for CLIP.
"""

import gzip
import zlib
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import RobertaProcessing

from serving.errors import CheckpointError
from serving.inputs.tokenizer import END, START
from serving.util.typed_json import parse_json

MERGES = 49152 - 256 - 2
"""Number of merges that OpenAI uses (`clip/simple_tokenizer.py`), of the 262144 in the file."""

PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
    r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
"""OpenAI's pattern that splits a cleaned text into words, without its flag to ignore case. After
lowercasing, the flag affects only two characters: the long s in a contraction, and U+0345, which
OpenAI's tokenizer drops."""

_EXPECTED = "expected OpenAI's bpe_simple_vocab_16e6.txt.gz"


def openai_tokenizer(bpe_path: Path) -> Tokenizer:
    """Build CLIP's tokenizer from OpenAI's `bpe_simple_vocab_16e6.txt.gz`.

    Normalizer, pre-tokenizer and post-processor are those of transformers'
    `tokenization_clip.py`, so that transformers tokenizes in the same way with the saved file.

    Args:
        bpe_path: the vocabulary file from OpenAI's or OpenCLIP's package.

    Returns:
        A tokenizer with 49408 entries. The last two are `<|startoftext|>` and `<|endoftext|>`.

    Raises:
        CheckpointError: the file is missing, not gzip, or not this vocabulary.
    """
    merges = _merges(bpe_path)
    symbols = _byte_symbols()
    entries = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    if len(vocabulary) != len(entries):
        raise CheckpointError(f"{bpe_path} repeats an entry; {_EXPECTED}")
    try:
        return clip_tokenizer(vocabulary, merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{bpe_path}: its merges are inconsistent ({error}); {_EXPECTED}"
        ) from error


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer without merges, for random weights. A token is one UTF-8 byte.

    Its special tokens have the last two ids of `vocab_size`, as in OpenAI's vocabulary.
    """
    symbols = _byte_symbols()
    entries = [*symbols, *(s + "</w>" for s in symbols)]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    return clip_tokenizer(vocabulary | {START: vocab_size - 2, END: vocab_size - 1}, [])


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, a `vocab.json` with its `merges.txt`, or OpenAI's vocabulary file.

    Raises:
        CheckpointError: the file is none of these, or is damaged.
    """
    if path.suffix == ".gz":
        return openai_tokenizer(path)
    try:
        if path.name == "vocab.json":
            vocabulary = parse_json(path.read_text(encoding="utf-8"))
            lines = path.with_name("merges.txt").read_text(encoding="utf-8").splitlines()
            pairs = [line.split() for line in lines if line and not line.startswith("#version")]
            return clip_tokenizer(vocabulary, [(first, second) for first, second in pairs])
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception on a parse error
        raise CheckpointError(f"{path}: not a readable tokenizer: {error}") from error


def clip_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Return a tokenizer in CLIP's format. `vocabulary` has to contain START and END."""
    tokenizer = with_clip_steps(
        BPE(
            vocabulary,
            merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=END,
        )
    )
    tokenizer.post_processor = RobertaProcessing(
        (END, vocabulary[END]),
        (START, vocabulary[START]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (START, END)])
    return tokenizer


def with_clip_steps(model: BPE) -> Tokenizer:
    """Return a tokenizer of `model` with CLIP's normalization, word pattern and decoding."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(bpe_path: Path) -> list[tuple[str, str]]:
    try:
        with gzip.open(bpe_path) as file:
            lines = file.read().decode("utf-8").split("\n")
    except FileNotFoundError as error:
        raise CheckpointError(f"{bpe_path}: no such file; {_EXPECTED}") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{bpe_path} cannot be read ({error}); {_EXPECTED}") from error
    # The first line is a header: "bpe_simple_vocab_16e6.txt#version: 0.2".
    pairs = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
    if len(pairs) < MERGES or "#version" not in lines[0]:
        raise CheckpointError(
            f"{bpe_path} has {len(lines)} lines and starts with {lines[0][:40]!r}; {_EXPECTED}, "
            f"which has a header with '#version' and at least {MERGES} merges"
        )
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if len(merges) < MERGES:
        number = next(n for n, pair in enumerate(pairs, 2) if len(pair) != 2)
        raise CheckpointError(f"{bpe_path}: line {number} is not a pair of symbols; {_EXPECTED}")
    return merges


def _byte_symbols() -> list[str]:
    """Return a printable character per byte value, in the order of OpenAI's `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]
