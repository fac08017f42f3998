"""Loading of a checkpoint by name: towers, preprocessing and tokenizer.

A name is one of
    random:ViT-B-32[@seed]           seeded random weights, to measure latency
    ViT-B/32                         OpenAI's published file, by OpenAI's name
    openai/clip-vit-base-patch32     Hugging Face hub id, optionally with @revision
    path/to/directory                directory in Hugging Face's or OpenCLIP's layout
    path/to/file                     OpenAI .pt (TorchScript archive or state dict), OpenCLIP
                                     .safetensors / .bin / .pt
"""

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import torch

from export.checkpoints.architectures import (
    ARCHITECTURES,
    KNOWN_MODELS,
    OPENAI_MEAN,
    OPENAI_STD,
    KnownModel,
)
from export.checkpoints.download import download_file, download_hub
from export.checkpoints.layouts import openai_image_spec, read_directory, read_file
from export.checkpoints.vocabulary import byte_tokenizer, load_tokenizer
from export.checkpoints.weight_names import check_state, load_state
from export.towers.clip import Activation, Clip, ClipConfig
from serving.bundles.manifest import DEFAULT_TEMPLATES, ImageSpec, TextSpec
from serving.errors import CheckpointError
from serving.util.files import check_utf8
from serving.util.finite import INT32_MAX

_NAMES = [model.name for model in KNOWN_MODELS] + [f"random:{name}" for name in ARCHITECTURES]
_TOKENIZER_ADVICE = (
    "give OpenAI's bpe_simple_vocab_16e6.txt.gz or a tokenizer.json with --vocabulary FILE"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Loaded checkpoint: both towers, preprocessing, tokenizer and provenance."""

    name: str
    """Short name without slashes, which can name a directory."""
    source: str
    """Name that the checkpoint was loaded by."""
    clip: Clip
    """Both towers, float32, in eval mode."""
    image: ImageSpec
    text: TextSpec
    tokenizer: tokenizers.Tokenizer
    templates: tuple[str, ...]
    weights: Literal["trained", "random"]
    weights_sha256: str


def load_checkpoint(
    name: str,
    *,
    vocabulary: Path | None = None,
    activation: Activation | None = None,
) -> Checkpoint:
    """Load a checkpoint.

    Args:
        name: one of the forms in the module's docstring.
        vocabulary: OpenAI's `bpe_simple_vocab_16e6.txt.gz` or a `tokenizer.json`, for checkpoints
            without a tokenizer.
        activation: activation function of a weights file without a configuration.

    Raises:
        CheckpointError: the name is unknown, the checkpoint is incomplete or not a CLIP, or its
            files do not belong together.
    """
    if name.startswith("random:"):
        return _random(name, vocabulary)
    known = next((model for model in KNOWN_MODELS if model.name == name), None)
    path, source = Path(name), name
    check_utf8(path)
    if known and known.sha256:
        path = download_file(known.source, known.sha256)
    elif known or (not path.exists() and _looks_like_hub_id(name)):
        path, name = _from_hub(name), name.partition("@")[0]
    if path.is_dir():
        files = read_directory(path, needs_tokenizer=vocabulary is None)
    elif path.is_file():
        files = read_file(path, activation)
    else:
        raise _unknown(name)
    tokenizer = load_tokenizer(vocabulary or files.tokenizer or _hub_tokenizer(known))
    # Compared without memory for the towers, which wrong sizes in a configuration could exhaust.
    with torch.device("meta"):
        planned = Clip(files.config, files.image.mean, files.image.std)
    check_state(planned, files.state, files.layout)
    clip = Clip(files.config, files.image.mean, files.image.std)
    load_state(clip, files.state, files.layout)
    return Checkpoint(
        name=path.stem
        if path.is_file()
        else Path(name).resolve().name,  # resolved for "." and "x/.."
        source=source,
        clip=clip.eval(),
        image=files.image,
        text=_text_spec(files.config, tokenizer),
        tokenizer=tokenizer,
        templates=files.templates,
        weights="trained",
        weights_sha256=files.sha256,
    )


def at_revision(name: str, revision: str) -> str:
    """Return the name of a Hugging Face repository at a branch, tag or commit.

    Raises:
        CheckpointError: `name` is not the id of a repository.
    """
    if Path(name).exists() or "@" in name or not _looks_like_hub_id(name):
        raise CheckpointError(
            f"{name!r} is not a Hugging Face id, so it has no revisions",
            advice="leave out --revision, or give an id 'owner/name'",
        )
    return f"{name}@{revision}"


def _looks_like_hub_id(name: str) -> bool:
    name = name.partition("@")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and Path(name).suffix == ""


def _from_hub(name: str) -> Path:
    try:
        repo, _, revision = name.partition("@")
        return download_hub(repo, revision or None)
    except CheckpointError as error:
        # A misspelled known name such as "ViT-B/33" also looks like a hub id.
        if name in _NAMES or not (suggestion := _suggestion(name, cutoff=0.8)):
            raise
        raise CheckpointError(f"{error}; {suggestion.rstrip()}") from error


def _suggestion(name: str, cutoff: float) -> str:
    close = difflib.get_close_matches(name, _NAMES, n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        f"unknown checkpoint {name!r}: no such file or directory, and not a known name",
        advice=f"{_suggestion(name, cutoff=0.5)}run `clip-deploy list` for the known names, or "
        "give a Hugging Face id 'owner/name'",
    )


def _hub_tokenizer(known: KnownModel | None) -> Path:
    repo = known.tokenizer_repo if known else "openai/clip-vit-base-patch32"
    try:
        return download_hub(repo, only_tokenizer=True) / "tokenizer.json"
    except CheckpointError as error:
        raise CheckpointError(
            f"the checkpoint has no tokenizer, and that of {repo} is not available: {error}",
            advice=_TOKENIZER_ADVICE,
        ) from error


def _text_spec(config: ClipConfig, tokenizer: tokenizers.Tokenizer) -> TextSpec:
    text = config.text
    start_id = tokenizer.token_to_id("<|startoftext|>")
    end_id = tokenizer.token_to_id("<|endoftext|>")
    if start_id is None or end_id != text.end_id:
        raise CheckpointError(
            f"the tokenizer's <|endoftext|> is {end_id} and its <|startoftext|> is {start_id}, but "
            f"the text tower pools at {text.end_id}: tokenizer and weights are of different models"
        )
    if tokenizer.get_vocab_size() > text.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, but the text tower has "
            f"{text.vocab_size}: tokenizer and weights are of different models"
        )
    return TextSpec(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        start_id=start_id,
        end_id=end_id,
        pad_id=end_id,
    )


def _random(name: str, vocabulary: Path | None) -> Checkpoint:
    architecture, _, seed = name.removeprefix("random:").partition("@")
    config = ARCHITECTURES.get(architecture)
    if config is None or not (seed or "0").isdecimal() or int(seed or 0) > INT32_MAX:
        raise CheckpointError(
            f"{name!r}: expected random:ARCHITECTURE or random:ARCHITECTURE@SEED, where "
            f"ARCHITECTURE is one of {', '.join(ARCHITECTURES)}, and SEED at most {INT32_MAX:,}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        clip = Clip(config, OPENAI_MEAN, OPENAI_STD).eval()
    digest = hashlib.sha256()
    for tensor in clip.state_dict().values():
        digest.update(memoryview(tensor.detach().contiguous().flatten().numpy()))
    tokenizer = load_tokenizer(vocabulary) if vocabulary else byte_tokenizer(config.text.vocab_size)
    return Checkpoint(
        name=f"random-{architecture}",
        source=name,
        clip=clip,
        image=openai_image_spec(config.image.image_size),
        text=_text_spec(config, tokenizer),
        tokenizer=tokenizer,
        templates=DEFAULT_TEMPLATES,
        weights="random",
        weights_sha256=digest.hexdigest(),
    )
