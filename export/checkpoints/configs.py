"""Model configurations: Hugging Face's `config.json`, OpenCLIP's `open_clip_config.json`, and
configurations inferred from the shapes of weights.

The only weight names used here are those whose shapes determine the configuration.
`export.checkpoints.weight_names` has the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from export.towers.clip import (
    Activation,
    ClipConfig,
    ResNetConfig,
    TextConfig,
    VisionTransformerConfig,
)
from serving.bundles.manifest import ImageSpec
from serving.errors import CheckpointError

State = Mapping[str, Tensor]

LARGEST = 1 << 24
"""Maximum of any size in a configuration. The largest that models have are vocabularies of about a
million tokens."""
SMALLEST_EPSILON = 1e-12
"""Minimum epsilon of LayerNorm. With 0, a constant input becomes NaN."""
_MOST_LAYERS = 1000

_ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"activation {name!r} is not supported; expected quick_gelu or gelu")
    return _ACTIVATIONS[name]


@dataclass(frozen=True, slots=True)
class Section:
    """Object of a configuration, whose numbers are checked when they are read."""

    place: str
    """File, and place of the object in it, for errors."""
    values: Mapping[str, Any]

    def section(self, key: str) -> "Section":
        """Return an object in this one; empty if it is missing or null.

        Raises:
            CheckpointError: it is not an object.
        """
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"expected an object, found {value!r}", name=self._name(key))
        return Section(self._name(key), value)

    def size(self, key: str, default: int, smallest: int = 1) -> int:
        """Return an integer from `smallest` to `LARGEST`.

        Raises:
            CheckpointError: it is not; the error has its name.
        """
        value = self.values.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not smallest <= value <= LARGEST:
            raise CheckpointError(
                f"expected an integer from {smallest} to {LARGEST:,}, found {value!r}",
                name=self._name(key),
            )
        return value

    def number(self, key: str, default: float, smallest: float, largest: float) -> float:
        """Return a number from `smallest` to `largest`.

        Raises:
            CheckpointError: it is not; the error has its name.
        """
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not smallest <= value <= largest:
            raise CheckpointError(
                f"expected a number from {smallest:g} to {largest:g}, found {value!r}",
                name=self._name(key),
            )
        return float(value)

    def _name(self, key: str) -> str:
        return f"{self.place}, {key}"


def config_from_hugging_face(config: Mapping[str, Any]) -> ClipConfig:
    """Read the architecture from a Hugging Face CLIP `config.json`.

    A missing key has the default of `transformers.CLIPTextConfig` or `CLIPVisionConfig`, which are
    the sizes of ViT-B/32.

    Raises:
        CheckpointError: the configuration is not of a CLIP model, or a size is invalid.
    """
    if config.get("model_type") != "clip":
        raise CheckpointError(
            f"config.json has model_type {config.get('model_type')!r}; expected 'clip'"
        )
    return _checked(_hugging_face_sizes(Section("config.json", config)), "config.json")


def _hugging_face_sizes(config: Section) -> ClipConfig:
    text, vision = config.section("text_config"), config.section("vision_config")
    vocab_size = text.size("vocab_size", 49408)
    # Configurations written before 2023 have an eos_token_id of 2, which is wrong: the end-of-text
    # token has the highest id (transformers, modeling_clip.py, CLIPTextTransformer.forward).
    end_id = text.size("eos_token_id", 49407, 0)
    return ClipConfig(
        embed_dim=config.size("projection_dim", 512),
        image=VisionTransformerConfig(
            width=vision.size("hidden_size", 768),
            layers=vision.size("num_hidden_layers", 12),
            heads=vision.size("num_attention_heads", 12),
            mlp_width=vision.size("intermediate_size", 3072),
            activation=_activation(vision.values.get("hidden_act", "quick_gelu")),
            norm_eps=vision.number("layer_norm_eps", 1e-5, SMALLEST_EPSILON, 1),
            image_size=vision.size("image_size", 224),
            patch_size=vision.size("patch_size", 32),
        ),
        text=TextConfig(
            width=text.size("hidden_size", 512),
            layers=text.size("num_hidden_layers", 12),
            heads=text.size("num_attention_heads", 8),
            mlp_width=text.size("intermediate_size", 2048),
            activation=_activation(text.values.get("hidden_act", "quick_gelu")),
            norm_eps=text.number("layer_norm_eps", 1e-5, SMALLEST_EPSILON, 1),
            context_length=text.size("max_position_embeddings", 77),
            vocab_size=vocab_size,
            end_id=vocab_size - 1 if end_id == 2 else end_id,
        ),
    )


def _checked(config: ClipConfig, file: str) -> ClipConfig:
    """Return `config`, or raise a CheckpointError if no towers can be built from it."""
    for name, tower in (("image", config.image), ("text", config.text)):
        if isinstance(tower, ResNetConfig):
            continue
        smallest = min(tower.width, tower.layers, tower.heads, tower.mlp_width, config.embed_dim)
        if smallest < 1 or tower.width % tower.heads or tower.layers > _MOST_LAYERS:
            raise CheckpointError(
                f"{file}: the {name} tower has width {tower.width}, {tower.layers} layers and "
                f"{tower.heads} heads; expected positive sizes, at most {_MOST_LAYERS} layers, and "
                "a width divisible by the number of heads"
            )
        if isinstance(tower, VisionTransformerConfig) and not (
            0 < tower.patch_size <= tower.image_size
        ):
            raise CheckpointError(
                f"{file}: patch_size is {tower.patch_size} and image_size is {tower.image_size}; "
                "expected a positive patch_size that is at most image_size"
            )
    return config


def config_to_hugging_face(config: ClipConfig, start_id: int) -> dict[str, Any]:
    """Return the `config.json` from which `transformers.CLIPModel.from_pretrained` reads `config`.

    Raises:
        CheckpointError: the image tower is a ResNet.
    """
    image, text = config.image, config.text
    if isinstance(image, ResNetConfig):
        raise CheckpointError(
            "a ResNet has no Hugging Face layout", advice="save it in OpenCLIP's layout"
        )

    def common(tower: VisionTransformerConfig | TextConfig) -> dict[str, Any]:
        return {
            "hidden_size": tower.width,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "intermediate_size": tower.mlp_width,
            "hidden_act": tower.activation,
            "layer_norm_eps": tower.norm_eps,
            "projection_dim": config.embed_dim,
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": {
            "model_type": "clip_text_model",
            **common(text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": start_id,
            "eos_token_id": text.end_id,
            "pad_token_id": text.end_id,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **common(image),
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "num_channels": 3,
        },
    }


def config_to_open_clip(config: ClipConfig, image: ImageSpec) -> dict[str, Any]:
    """Return the `open_clip_config.json` of a ResNet, as OpenCLIP's `push_to_hf_hub` writes it.

    Raises:
        CheckpointError: the image tower is not a ResNet.
    """
    vision, text = config.image, config.text
    if not isinstance(vision, ResNetConfig):
        raise CheckpointError(
            "expected a ResNet, got a vision transformer",
            advice="save it in Hugging Face's layout",
        )
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": text.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": vision.image_size,
                "layers": list(vision.layers),
                "width": vision.width,
            },
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
            },
        },
        "preprocess_cfg": {
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": image.interpolation,
            "resize_mode": "shortest",
        },
    }


# Keys of a plain CLIP. Any other key (timm towers, attentional pooling, layer scale, sigmoid
# losses, ...) changes the computation of a tower, so it raises an error.
_OPEN_CLIP_KEYS = {
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
"""Keys that describe a plain CLIP."""
_OPEN_CLIP_UNUSED = {
    *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "eos_id", "pad_id"),
    *("timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    *("timm_model_pretrained", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}
"""Keys without effect on the embeddings of a plain CLIP: they matter in training, or together with
a key that is not supported (open_clip 3.3, CLIPVisionCfg and CLIPTextCfg)."""
_OPEN_CLIP_DEFAULTS = {
    "pos_embed_type": "learnable",
    "block_type": "default",
    "proj_type": "linear",
}
"""Defaults of keys that are not None, False or empty by default. `pool_type` differs by section."""
_POOLS = {"vision_cfg": "tok", "text_cfg": "argmax"}
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
"""Channels per head of image towers by width, for weights without a configuration: those of ViT-H,
g, bigG and e. They are 64 for every other width in open_clip 3.3's `model_configs`, and for every
text tower."""


def config_from_open_clip(state: State, document: Mapping[str, Any]) -> ClipConfig:
    """Read the architecture of OpenCLIP weights.

    Sizes come from the shapes of `state`, head counts and the activation from `document`.

    Args:
        state: the weights.
        document: the content of `open_clip_config.json`.

    Raises:
        CheckpointError: the configuration has a setting that a plain CLIP does not have.
    """
    file = Section("open_clip_config.json", document)
    # The files in open_clip's own model_configs are not nested.
    model = file if "vision_cfg" in document else file.section("model_cfg")
    for section, known in _OPEN_CLIP_KEYS.items():
        if section not in model.values:
            raise CheckpointError(
                f"open_clip_config.json has no {section}; expected model_cfg with vision_cfg and "
                "text_cfg, as open_clip writes it"
            )
        values = model.section(section).values
        unknown = [
            key
            for key in sorted(values.keys() - known - _OPEN_CLIP_UNUSED)
            if not _is_default(section, key, values[key])
        ]
        if unknown:
            raise CheckpointError(
                f"open_clip_config.json: {section} has {', '.join(unknown)}, which a plain CLIP "
                "does not have; only ViT and ModifiedResNet towers with a causal text tower are "
                "supported"
            )
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    return config_from_openai(
        state,
        "quick_gelu" if model.values.get("quick_gelu", False) else "gelu",
        vision.size("head_width", 64),
        text.size("heads", 1) if "heads" in text.values else None,
    )


def _is_default(section: str, key: str, value: object) -> bool:
    default = _POOLS[section] if key == "pool_type" else _OPEN_CLIP_DEFAULTS.get(key)
    return value in (None, False, default) or value == {}


def _depth(state: State, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _head_count(width: int, head_width: int) -> int:
    if width % head_width:
        raise CheckpointError(
            f"a width of {width} is not divisible by {head_width}, the usual width of a head",
            advice="put the model's open_clip_config.json in the directory of the weights",
        )
    return width // head_width


def config_from_openai(
    state: State,
    activation: Activation,
    head_width: int | None = None,
    text_heads: int | None = None,
) -> ClipConfig:
    """Infer the architecture from the shapes of a state dict in OpenAI's layout.

    Shapes do not determine the number of attention heads. All OpenAI models have 64 channels per
    head (clip/model.py, `build_model`), and so have OpenCLIP's, except the largest
    (`_HEAD_WIDTHS`).

    Args:
        state: the weights.
        activation: activation function of both towers.
        head_width: channels per head of the image tower; by default, those of the published models
            of this width.
        text_heads: heads of the text tower; by default, 64 channels each.

    Raises:
        CheckpointError: a weight whose shape is needed is missing, or has an impossible shape.
    """
    try:
        config = ClipConfig(
            embed_dim=state["text_projection"].shape[1],
            image=_image_config(state, activation, head_width),
            text=_text_config(state, activation, text_heads),
        )
    except CheckpointError:
        raise
    except (IndexError, ValueError) as error:
        raise CheckpointError(
            f"not a CLIP state dict: a weight has another number of dimensions ({error})"
        ) from error
    except KeyError as error:
        raise CheckpointError(
            f"not a CLIP state dict: weight {error.args[0]!r} is missing; expected the layout of "
            "OpenAI's or OpenCLIP's CLIP ('visual.*', 'transformer.*', 'text_projection')"
        ) from None
    return _checked(config, "shapes of the weights")


def _image_config(
    state: State, activation: Activation, head_width: int | None
) -> VisionTransformerConfig | ResNetConfig:
    if "visual.proj" not in state:
        width = state["visual.layer1.0.conv1.weight"].shape[0]
        places = state["visual.attnpool.positional_embedding"].shape[0] - 1
        depths = [_depth(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
        return ResNetConfig(
            image_size=32 * round(places**0.5),
            width=width,
            layers=(depths[0], depths[1], depths[2], depths[3]),
            heads=_head_count(32 * width, 64),
        )
    width, _, _, patch = state["visual.conv1.weight"].shape
    patches = state["visual.positional_embedding"].shape[0] - 1
    return VisionTransformerConfig(
        width=width,
        layers=_depth(state, "visual.transformer.resblocks."),
        heads=_head_count(width, head_width or _HEAD_WIDTHS.get(width, 64)),
        mlp_width=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        activation=activation,
        image_size=patch * round(patches**0.5),
        patch_size=patch,
    )


def _text_config(state: State, activation: Activation, heads: int | None) -> TextConfig:
    context_length, width = state["positional_embedding"].shape
    vocab_size = state["token_embedding.weight"].shape[0]
    return TextConfig(
        width=width,
        layers=_depth(state, "transformer.resblocks."),
        heads=heads or _head_count(width, 64),
        mlp_width=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        activation=activation,
        context_length=context_length,
        vocab_size=vocab_size,
        end_id=vocab_size - 1,
    )
