"""A checkpoint's name -> loaded towers, their preprocessing facts and their tokenizer.

A name is one of
    random:ViT-B-32[@seed]           seeded weights of a true architecture, for latency work
    ViT-B/32                         OpenAI's published file, by the name OpenAI gave it
    openai/clip-vit-base-patch32     a Hugging Face hub id
    path/to/directory                Hugging Face or OpenCLIP layout
    path/to/file                     OpenAI .pt (TorchScript archive or state dict), OpenCLIP
                                     .safetensors / .bin / .pt
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch

from export.architectures import (
    ARCHITECTURES,
    KNOWN_MODELS,
    OPENAI_MEAN,
    OPENAI_STD,
    KnownModel,
)
from export.configs import config_from_hugging_face, config_from_open_clip, config_from_openai
from export.download import download_file, download_hub
from export.formats import Layout, State, load_state
from export.towers import Activation, Clip, ClipConfig
from export.vocabulary import byte_tokenizer, load_tokenizer
from export.weights import read_json, read_weights, strip_wrappers
from serving.bundle import DEFAULT_TEMPLATES, ImageSpec, TextSpec
from serving.errors import CheckpointError

_NAMES = [model.name for model in KNOWN_MODELS] + [f"random:{name}" for name in ARCHITECTURES]
_TOKENIZER_HINT = (
    "give OpenAI's bpe_simple_vocab_16e6.txt.gz or a tokenizer.json with --vocabulary FILE"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that is known about a model before anything is made of it."""

    name: str
    """Good for a directory name."""
    source: str
    clip: Clip
    """float32, eval mode."""
    image: ImageSpec
    text: TextSpec
    tokenizer: tokenizers.Tokenizer
    templates: tuple[str, ...]
    weights: Literal["trained", "random"]
    weights_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """What a layout's reader found, before towers are built of it."""

    state: State
    layout: Layout
    config: ClipConfig
    image: ImageSpec
    sha256: str
    tokenizer: Path | None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


def load_checkpoint(
    name: str,
    *,
    vocabulary: Path | None = None,
    activation: Activation | None = None,
) -> Checkpoint:
    """Load the checkpoint `name` (see the module's text for what a name may be).

    Args:
        vocabulary: OpenAI's `bpe_simple_vocab_16e6.txt.gz` or a `tokenizer.json`, for checkpoints
            that bring no tokenizer.
        activation: of a bare weights file, which does not say.

    Raises:
        CheckpointError: unknown name, incomplete directory, not a CLIP, or sizes that disagree.
    """
    if name.startswith("random:"):
        return _random(name, vocabulary)
    known = next((model for model in KNOWN_MODELS if model.name == name), None)
    path = Path(name)
    if known and known.sha256:
        path = download_file(known.source, known.sha256)
    elif known or (not path.exists() and _looks_like_hub_id(name)):
        path = _from_hub(name)
    if path.is_dir():
        files = _read_directory(path)
    elif path.is_file():
        files = _read_file(path, activation)
    else:
        raise _unknown(name)
    tokenizer = load_tokenizer(vocabulary or files.tokenizer or _hub_tokenizer(known))
    clip = Clip(files.config, files.image.mean, files.image.std)
    load_state(clip, files.state, files.layout)
    return Checkpoint(
        name=path.stem if path.is_file() else Path(name).resolve().name,  # also of "." and "x/.."
        source=name,
        clip=clip.eval(),
        image=files.image,
        text=_text_spec(files.config, tokenizer),
        tokenizer=tokenizer,
        templates=files.templates,
        weights="trained",
        weights_sha256=files.sha256,
    )


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and Path(name).suffix == ""


def _from_hub(name: str) -> Path:
    try:
        return download_hub(name)
    except CheckpointError as error:
        # "ViT-B/33" looks like a hub id, too.
        if name in _NAMES or not (hint := _suggestion(name, cutoff=0.8)):
            raise
        raise CheckpointError(f"{error}; {hint.rstrip()}") from error


def _suggestion(name: str, cutoff: float) -> str:
    close = difflib.get_close_matches(name, _NAMES, n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _unknown(name: str) -> CheckpointError:
    hint = _suggestion(name, cutoff=0.5)
    return CheckpointError(
        f"unknown checkpoint {name!r}: no such file or directory, and not a known name; {hint}"
        "`python -m export list` shows the known ones, any Hugging Face id 'owner/name' works too"
    )


def _hub_tokenizer(known: KnownModel | None) -> Path:
    repo = known.tokenizer_repo if known else "openai/clip-vit-base-patch32"
    try:
        return download_hub(repo, only_tokenizer=True) / "tokenizer.json"
    except CheckpointError as error:
        raise CheckpointError(
            f"the checkpoint brings no tokenizer, and {repo}'s was not to be had: {error}; "
            f"{_TOKENIZER_HINT}"
        ) from error


def _text_spec(config: ClipConfig, tokenizer: tokenizers.Tokenizer) -> TextSpec:
    text = config.text
    start_id = tokenizer.token_to_id("<|startoftext|>")
    end_id = tokenizer.token_to_id("<|endoftext|>")
    if start_id is None or end_id != text.end_id:
        raise CheckpointError(
            f"the tokenizer's <|endoftext|> is {end_id}, its <|startoftext|> {start_id}; the text "
            f"tower pools at {text.end_id}: tokenizer and weights are of different models"
        )
    if tokenizer.get_vocab_size() > text.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the text tower embeds "
            f"{text.vocab_size}: tokenizer and weights are of different models"
        )
    return TextSpec(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        start_id=start_id,
        end_id=end_id,
        pad_id=end_id,
    )


def _openai_image_spec(size: int, preprocess: Mapping[str, Any] | None = None) -> ImageSpec:
    facts = preprocess or {}
    if facts.get("resize_mode", "shortest") != "shortest":
        raise CheckpointError(
            f"open_clip_config.json: resize_mode {facts['resize_mode']!r}; expected 'shortest'"
        )
    return ImageSpec(
        size=size,
        resize=size,
        interpolation=facts.get("interpolation", "bicubic"),
        mean=_per_channel(facts.get("mean", OPENAI_MEAN)),
        std=_per_channel(facts.get("std", OPENAI_STD)),
        pipeline="openai",
    )


# ---------------------------------------------------------------------------- random weights


def _random(name: str, vocabulary: Path | None) -> Checkpoint:
    architecture, _, seed = name.removeprefix("random:").partition("@")
    config = ARCHITECTURES.get(architecture)
    if config is None or not (seed or "0").isdecimal():
        raise CheckpointError(
            f"{name!r}: expected random:ARCHITECTURE or random:ARCHITECTURE@SEED with an "
            f"architecture of {', '.join(ARCHITECTURES)}"
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
        image=_openai_image_spec(config.image.image_size),
        text=_text_spec(config, tokenizer),
        tokenizer=tokenizer,
        templates=DEFAULT_TEMPLATES,
        weights="random",
        weights_sha256=digest.hexdigest(),
    )


# ---------------------------------------------------------------------------- directories


def _read_directory(path: Path) -> _Files:
    if (path / "config.json").exists():
        return _read_hugging_face(path)
    if (path / "open_clip_config.json").exists():
        return _read_open_clip(path)
    raise CheckpointError(
        f"{path}: no config.json (Hugging Face) and no open_clip_config.json (OpenCLIP) in it; "
        "a checkpoint directory has one of them beside its weights"
    )


def _read_hugging_face(path: Path) -> _Files:
    document = read_json(path / "config.json")
    weights = _first(path, "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    processor = _first(path, "preprocessor_config.json", "processor_config.json")
    tokenizer = _first(path, "tokenizer.json", "vocab.json")
    if tokenizer and tokenizer.name == "vocab.json" and not (path / "merges.txt").exists():
        tokenizer = None
    found = {
        "weights (model.safetensors)": weights,
        "preprocessor_config.json": processor,
        "tokenizer.json": tokenizer,
    }
    absent = [name for name, file in found.items() if file is None]
    if weights is None or processor is None or tokenizer is None:
        raise CheckpointError(f"{path}: half a checkpoint: {', '.join(absent)} not there")
    config = config_from_hugging_face(document)
    state, sha256 = read_weights(weights)
    return _Files(
        state=state,
        layout="hugging_face",
        config=config,
        image=_hugging_face_image_spec(processor, config.image.image_size),
        sha256=sha256,
        tokenizer=tokenizer,
        templates=tuple(document.get("prompt_templates", DEFAULT_TEMPLATES)),
    )


def _hugging_face_image_spec(path: Path, image_size: int) -> ImageSpec:
    document = read_json(path)
    document = document.get("image_processor", document)
    resample = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    try:
        size, crop = document["size"], document["crop_size"]
        spec = ImageSpec(
            size=int(crop["height"] if isinstance(crop, dict) else crop),
            resize=int(size["shortest_edge"] if isinstance(size, dict) else size),
            interpolation=resample[document.get("resample", 3)],  # type: ignore[arg-type]
            mean=_per_channel(document["image_mean"]),
            std=_per_channel(document["image_std"]),
            pipeline="huggingface",
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing or not supported" if type(error) is KeyError else str(error)
        raise CheckpointError(
            f"{path}: {reason}; expected a CLIPImageProcessor that resizes the shortest edge and "
            "crops the centre"
        ) from None
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if off := [step for step in steps if not document.get(step, True)]:
        raise CheckpointError(
            f"{path}: {', '.join(off)} switched off; expected a CLIPImageProcessor that does it"
        )
    if spec.size != image_size:
        raise CheckpointError(
            f"{path}: pictures are cropped to {spec.size}, but the image tower takes {image_size}"
        )
    return spec


def _per_channel(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _read_open_clip(path: Path) -> _Files:
    document = read_json(path / "open_clip_config.json")
    weights = _first(path, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if weights is None:
        raise CheckpointError(
            f"{path}: half a checkpoint: open_clip_model.safetensors is not there"
        )
    state, sha256 = read_weights(weights)
    state = strip_wrappers(state)
    config = config_from_open_clip(state, document)
    return _Files(
        state=state,
        layout="openai",
        config=config,
        image=_openai_image_spec(config.image.image_size, document.get("preprocess_cfg")),
        sha256=sha256,
        tokenizer=_first(path, "tokenizer.json"),
        templates=tuple(document.get("prompt_templates", DEFAULT_TEMPLATES)),
    )


def _first(directory: Path, *names: str) -> Path | None:
    return next((directory / name for name in names if (directory / name).exists()), None)


# ---------------------------------------------------------------------------- files


def _read_file(path: Path, activation: Activation | None) -> _Files:
    state, sha256 = read_weights(path)
    state = strip_wrappers(state)
    known = next((model for model in KNOWN_MODELS if model.sha256 == sha256), None)
    namesake = next((m for m in KNOWN_MODELS if m.source.endswith(f"/{path.name}")), None)
    if namesake and not known:
        raise CheckpointError(
            f"{path} is named like OpenAI's {namesake.name}, whose sha256 is {namesake.sha256}, "
            f"but has {sha256}: a damaged download? If it is your own model, rename it"
        )
    sidecar = path.with_name("open_clip_config.json")
    document = read_json(sidecar) if sidecar.exists() else None
    if document is not None and not known:
        config = config_from_open_clip(state, document)
    else:
        activation = "quick_gelu" if known else activation
        if activation is None:
            raise CheckpointError(
                f"{path}: weights do not say which activation they were trained with; give "
                "--activation quick_gelu (OpenAI's, and OpenCLIP's '-quickgelu' models) or "
                "--activation gelu (OpenCLIP's others), or put open_clip_config.json beside them"
            )
        config = config_from_openai(state, activation)
    return _Files(
        state=state,
        layout="openai",
        config=config,
        image=_openai_image_spec(
            config.image.image_size, document.get("preprocess_cfg") if document else None
        ),
        sha256=sha256,
        tokenizer=_first(path.parent, "tokenizer.json") if document else None,
    )
