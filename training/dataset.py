"""Reading of captioned images from files, and training of a tokenizer on their captions.

A directory has a `captions.txt` (one `file, caption` per line) or a `dataset.json`
(`[{"image_path": ..., "text": ...}]`). Paths are relative to it. An image can have more than one
caption.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from export.checkpoints.vocabulary import clip_tokenizer, with_clip_steps
from serving.bundles.manifest import ImageSpec, TextSpec
from serving.errors import InputError
from serving.inputs.preprocess import preprocess
from serving.inputs.tokenizer import END, START
from serving.inputs.tokenizer import Tokenizer as ServingTokenizer
from serving.util.progress import Progress, silent, tracked
from serving.util.typed_json import parse_json

END_OF_WORD = "</w>"
MIN_VOCABULARY = 514
"""Minimum size of a vocabulary: 256 bytes, 256 bytes at the end of a word, two special tokens."""


def train_tokenizer(captions: Sequence[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer in CLIP's format. It can encode any text.

    Args:
        captions: texts to train on.
        vocabulary: maximum number of tokens, including special ones.

    Raises:
        InputError: `vocabulary` is too small for all bytes and the special tokens.
    """
    if vocabulary < MIN_VOCABULARY:
        raise InputError(f"expected a vocabulary of at least {MIN_VOCABULARY}, got {vocabulary}")
    learner = with_clip_steps(models.BPE(end_of_word_suffix=END_OF_WORD))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [(merge[0], merge[1]) for merge in parse_json(learner.to_str())["model"]["merges"]]
    # OpenAI's order: bytes, bytes at the end of a word, merges, special tokens.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters)]
    merges = merges[: vocabulary - MIN_VOCABULARY]
    tokens += [left + right for left, right in merges]
    tokens += [START, END]
    numbered = {token: number for number, token in enumerate(tokens)}
    return clip_tokenizer(numbered, merges)


def text_spec(tokenizer: Tokenizer, context_length: int) -> TextSpec:
    """Return the TextSpec of a tokenizer. Padding is the end-of-text token, as in transformers."""
    vocabulary = tokenizer.get_vocab()
    end = vocabulary[END]
    return TextSpec(
        context_length=context_length,
        vocab_size=len(vocabulary),
        start_id=vocabulary[START],
        end_id=end,
        pad_id=end,
    )


def encode(
    tokenizer: Tokenizer, spec: TextSpec, texts: Sequence[str], *, truncate: bool = False
) -> torch.Tensor:
    """Tokenize texts in the same way as a server, to int32 [texts, length].

    Raises:
        TextError: a text is empty, has a lone surrogate, or is too long and `truncate` is False.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tokenizer.json"
        tokenizer.save(str(path))
        return torch.from_numpy(ServingTokenizer(path, spec)(texts, truncate=truncate))


def load_pixels(
    paths: Sequence[Path], image: ImageSpec, progress: Progress = silent
) -> torch.Tensor:
    """Load and preprocess image files, to uint8 [paths, 3, size, size].

    Raises:
        ImageError: an image cannot be decoded; the message names the file.
    """
    images = tracked(progress, "reading images", paths, len(paths))
    return torch.from_numpy(np.stack([preprocess(path, image) for path in images]))


def read_folder(folder: Path) -> list[tuple[Path, str]]:
    """Read the image paths and captions of a directory, in the order of its listing.

    Raises:
        InputError: the listing is missing or cannot be read, or images are missing.
    """
    text, table = folder / "captions.txt", folder / "dataset.json"
    if text.is_file():
        pairs = _read_captions(text)
    elif table.is_file():
        pairs = _read_table(table)
    else:
        raise InputError(
            f"expected captions.txt (one `file, caption` per line) or dataset.json "
            f'([{{"image_path": ..., "text": ...}}]) in {folder}, found neither'
        )
    if not pairs:
        raise InputError(
            f"the listing in {folder} has no pairs", advice="add a line for each caption"
        )
    missing = sorted({name for name, _ in pairs if not (folder / name).is_file()})
    if missing:
        names = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise InputError(
            f"{len(missing)} of the listed images are not in {folder}: {names}",
            advice="add the files or remove their lines",
        )
    return [(folder / name, caption) for name, caption in pairs]


def _read_captions(path: Path) -> list[tuple[str, str]]:
    """Read one `file, caption` per line; a caption can have commas. Skip Flickr8k's header."""
    pairs = []
    for number, line in enumerate(_read_utf8(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, comma, caption = (part.strip() for part in line.partition(","))
        if number == 1 and (name.lower(), caption.lower()) == ("image", "caption"):
            continue
        if not (name and comma and caption):
            raise InputError(f"{path}, line {number}: expected `file, caption`, got {line!r}")
        pairs.append((name, caption))
    return pairs


def _read_table(path: Path) -> list[tuple[str, str]]:
    """Read a JSON list of objects with the strings `image_path` and `text`."""
    try:
        rows: Any = parse_json(_read_utf8(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    pairs = []
    for number, row in enumerate(rows):
        values = [row.get(key) for key in ("image_path", "text")] if isinstance(row, dict) else []
        if not values or not all(isinstance(value, str) and value.strip() for value in values):
            raise InputError(
                f'{path}, item {number}: expected {{"image_path": "...", "text": "..."}}, '
                f"got {repr(row)[:100]}"
            )
        pairs.append((str(values[0]), str(values[1])))
    return pairs


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8, but byte {error.start} is not valid",
            advice="save the file as UTF-8",
        ) from None
