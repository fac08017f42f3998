"""Reading of checkpoint files and directories in the layouts of Hugging Face, OpenCLIP and OpenAI.

`export.checkpoints.load` resolves the name of a checkpoint to a path.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoints.architectures import KNOWN_MODELS, OPENAI_MEAN, OPENAI_STD
from export.checkpoints.configs import (
    Section,
    config_from_hugging_face,
    config_from_open_clip,
    config_from_openai,
)
from export.checkpoints.weight_names import Layout, State
from export.checkpoints.weights import read_json, read_weights, strip_wrappers
from export.towers.clip import Activation, ClipConfig
from serving.bundles.manifest import DEFAULT_TEMPLATES, ImageSpec
from serving.errors import CheckpointError

_HUGGING_FACE_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_HUGGING_FACE_WEIGHT = "text_model.embeddings.token_embedding.weight"
"""Weight that identifies Hugging Face's layout."""
OPEN_CLIP_WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
    *("model.safetensors", "pytorch_model.bin"),
)
"""Names that OpenCLIP's weights have in a directory with `open_clip_config.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Contents of a checkpoint: weights, configuration, preprocessing and tokenizer file."""

    state: State
    layout: Layout
    config: ClipConfig
    image: ImageSpec
    sha256: str
    tokenizer: Path | None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


def read_directory(path: Path, *, needs_tokenizer: bool = True) -> Files:
    """Read a checkpoint directory in Hugging Face's or OpenCLIP's layout.

    A directory with both configurations is read in Hugging Face's layout, unless its `config.json`
    is that of another kind of model.

    Args:
        path: the directory.
        needs_tokenizer: whether a Hugging Face directory must have a tokenizer.

    Raises:
        CheckpointError: a file is missing, cannot be read, or describes an unsupported model.
    """
    if (adapter := path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{adapter}: the directory has a PEFT adapter, which transformers would load as well",
            advice="merge it first, with PEFT's merge_and_unload(), and save the model to another "
            "directory; or remove the adapter's files to export the base model",
        )
    if is_hugging_face(path):
        return _read_hugging_face(path, needs_tokenizer=needs_tokenizer)
    if (path / "open_clip_config.json").exists():
        return _read_open_clip(path)
    raise CheckpointError(
        f"{path}: no config.json (Hugging Face) and no open_clip_config.json (OpenCLIP); expected "
        "one of them and the weights"
    )


def is_hugging_face(path: Path) -> bool:
    """Return whether a directory is in Hugging Face's layout.

    An OpenCLIP directory may have the `config.json` of another kind of model.
    """
    config = path / "config.json"
    if not config.exists():
        return False
    alone = not (path / "open_clip_config.json").exists()
    return alone or read_json(config).get("model_type") == "clip"


def _read_hugging_face(path: Path, *, needs_tokenizer: bool, weights: Path | None = None) -> Files:
    document = read_json(path / "config.json")
    weights = weights or _first(path, *_HUGGING_FACE_WEIGHTS)
    processor = _first(path, "preprocessor_config.json", "processor_config.json")
    tokenizer = _first(path, "tokenizer.json", "vocab.json")
    if tokenizer and tokenizer.name == "vocab.json" and not (path / "merges.txt").exists():
        tokenizer = None
    found = {
        "weights (model.safetensors)": weights,
        "preprocessor_config.json": processor,
        "tokenizer.json": tokenizer,
    }
    if not needs_tokenizer:
        del found["tokenizer.json"]
    absent = [name for name, file in found.items() if file is None]
    if absent or weights is None or processor is None:
        raise CheckpointError(f"{path}: incomplete checkpoint: missing {', '.join(absent)}")
    config = config_from_hugging_face(document)
    state, sha256 = read_weights(weights)
    return Files(
        state=strip_wrappers(state),
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
        edge = document["size"]
        edges = edge if isinstance(edge, dict) else {"shortest_edge": edge}
        squash = {"height", "width"} <= edges.keys()
        if squash:
            if edges["width"] != edges["height"]:
                raise ValueError(f"size is {edge}, which is not square")
            edges = {"shortest_edge": edges["height"]}
        # An image of the exact size needs no crop.
        crop = document["crop_size"] if document.get("do_center_crop", True) else edges
        crops = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
        crops = {"height": crops["shortest_edge"]} if "shortest_edge" in crops else crops
        spec = ImageSpec(
            size=Section("crop_size", {"height": crops["height"]}).size("height", 0),
            resize=Section("size", {"edge": edges["shortest_edge"]}).size("edge", 0),
            interpolation=resample[document.get("resample", 3)],  # type: ignore[arg-type]
            mean=_per_channel(document["image_mean"], "image_mean"),
            std=_per_channel(document["image_std"], "image_std"),
            pipeline="huggingface",
            resize_mode="squash" if squash else "shortest",
        )
        if crops.get("width", crops["height"]) != crops["height"]:
            raise ValueError(f"crop_size is {crop}, which is not square")
        spec.check("image_")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing or not supported" if type(error) is KeyError else str(error)
        raise CheckpointError(
            f"{path}: {reason}; expected a CLIPImageProcessor that resizes the shortest edge and "
            "crops the center, or resizes to a square"
        ) from None
    steps = ["do_resize", "do_rescale", "do_normalize"]
    steps += [] if squash else ["do_center_crop"]
    if off := [step for step in steps if not document.get(step, True)]:
        raise CheckpointError(
            f"{path}: {', '.join(off)} is off; expected a CLIPImageProcessor with all steps on"
        )
    factor = document.get("rescale_factor", 1 / 255)
    if type(factor) not in (int, float) or not abs(255 * factor - 1) <= 1e-3:
        raise CheckpointError(f"{path}: rescale_factor is {factor!r}; expected 1/255, as in CLIP")
    if spec.size != image_size:
        raise CheckpointError(
            f"{path}: images are cropped to {spec.size} px, but the image tower takes "
            f"{image_size} px"
        )
    if spec.resize < spec.size:
        raise CheckpointError(
            f"{path}: images are resized to {spec.resize} px and then cropped to {spec.size} px; "
            "expected a crop that is no larger than the resized image"
        )
    return spec


def _per_channel(values: object, key: str) -> tuple[float, float, float]:
    match values:
        case bool():
            pass
        case int() | float():  # both libraries use it for every channel
            return float(values), float(values), float(values)
        case [int() | float() as red, int() | float() as green, int() | float() as blue]:
            return float(red), float(green), float(blue)
    raise CheckpointError(f"expected three numbers, or one for all, found {values!r}", name=key)


def _read_open_clip(path: Path) -> Files:
    document = read_json(path / "open_clip_config.json")
    weights = _first(path, *OPEN_CLIP_WEIGHTS)
    if weights is None:
        raise CheckpointError(
            f"{path}: incomplete checkpoint: missing weights (open_clip_model.safetensors)"
        )
    state, sha256 = read_weights(weights)
    state = strip_wrappers(state)
    config = config_from_open_clip(state, document)
    return Files(
        state=state,
        layout="openai",
        config=config,
        image=openai_image_spec(config.image.image_size, document.get("preprocess_cfg")),
        sha256=sha256,
        tokenizer=_first(path, "tokenizer.json"),
        templates=tuple(document.get("prompt_templates", DEFAULT_TEMPLATES)),
    )


def _first(directory: Path, *names: str) -> Path | None:
    return next((directory / name for name in names if (directory / name).exists()), None)


def read_file(path: Path, activation: Activation | None) -> Files:
    """Read a weights file in OpenAI's layout, with the `open_clip_config.json` next to it, if any.

    Args:
        path: the weights file.
        activation: activation function, if neither a known sha256 nor a configuration gives it.

    Raises:
        CheckpointError: the file cannot be read, is not a CLIP, or its activation is unknown.
    """
    state, sha256 = read_weights(path)
    state = strip_wrappers(state)
    if _HUGGING_FACE_WEIGHT in state:
        return _beside_config(path)
    known = next((model for model in KNOWN_MODELS if model.sha256 == sha256), None)
    namesake = next((m for m in KNOWN_MODELS if m.source.endswith(f"/{path.name}")), None)
    if namesake and not known:
        raise CheckpointError(
            f"{path} has the name of OpenAI's {namesake.name}, whose sha256 is {namesake.sha256}, "
            f"but its sha256 is {sha256}",
            advice="download it again if it is damaged, or rename it if it is your own model",
        )
    sidecar = path.with_name("open_clip_config.json")
    document = read_json(sidecar) if sidecar.exists() else None
    if document is not None and not known:
        config = config_from_open_clip(state, document)
    else:
        activation = "quick_gelu" if known else activation
        if activation is None:
            raise CheckpointError(
                f"{path}: the weights do not tell the activation function they were trained with",
                advice="give --activation quick_gelu (OpenAI's models, and OpenCLIP's with "
                "'-quickgelu') or --activation gelu (other OpenCLIP models), or put "
                "open_clip_config.json in the same directory",
            )
        config = config_from_openai(state, activation)
    return Files(
        state=state,
        layout="openai",
        config=config,
        image=openai_image_spec(
            config.image.image_size, document.get("preprocess_cfg") if document else None
        ),
        sha256=sha256,
        tokenizer=_first(path.parent, "tokenizer.json") if document else None,
    )


def _beside_config(path: Path) -> Files:
    """Read a weights file in Hugging Face's layout, with the configuration next to it."""
    config = path.with_name("config.json")
    if not config.exists():
        raise CheckpointError(
            f"{path} has weights in Hugging Face's layout, and there is no config.json next to it",
            advice="put config.json, preprocessor_config.json and tokenizer.json of the model that "
            "it was trained from into its directory",
        )
    return _read_hugging_face(path.parent, needs_tokenizer=False, weights=path)


def openai_image_spec(image_size: int, preprocess: Mapping[str, Any] | None = None) -> ImageSpec:
    """Return OpenAI's preprocessing.

    Args:
        image_size: input size of the image tower, in pixels.
        preprocess: `preprocess_cfg` of an `open_clip_config.json`, which overrides the defaults.

    Raises:
        CheckpointError: the resize mode is not supported, or a setting is out of range.
    """
    place = "open_clip_config.json, preprocess_cfg"
    document = Section("open_clip_config.json", {"preprocess_cfg": preprocess})
    facts = document.section("preprocess_cfg").values
    mode = facts.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise CheckpointError(
            f"open_clip_config.json: resize_mode is {mode!r}; expected 'shortest' or 'squash'"
        )
    named = facts.get("interpolation") or "bicubic"
    if named not in ("bilinear", "bicubic", "random"):
        raise CheckpointError(
            f"open_clip_config.json: interpolation is {named!r}; expected 'bicubic', 'bilinear' "
            "or 'random', as in open_clip"
        )
    spec = ImageSpec(
        size=image_size,
        resize=image_size,
        # `random` is for training; open_clip then uses bicubic for inference.
        interpolation="bilinear" if named == "bilinear" else "bicubic",
        mean=_per_channel(facts.get("mean") or OPENAI_MEAN, f"{place}, mean"),
        std=_per_channel(facts.get("std") or OPENAI_STD, f"{place}, std"),
        pipeline="openai",
        resize_mode="squash" if mode == "squash" else "shortest",
    )
    try:
        spec.check()
    except ValueError as error:
        raise CheckpointError(str(error), name=place) from None
    return spec
