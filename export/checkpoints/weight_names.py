"""Weight names of the two layouts of CLIP: Hugging Face's, and OpenAI's, which OpenCLIP also uses.

One function per layout translates the names of our parameters, for reading and for writing.
OpenAI's layout also packs query, key and value into one matrix and stores projections transposed;
`unpack_openai` and `pack_openai` convert from and to this form.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from safetensors.torch import save
from torch import Tensor

from export.checkpoints.configs import config_to_hugging_face, config_to_open_clip
from export.towers.clip import Clip, ResNetConfig
from serving.bundles.manifest import ImageSpec
from serving.errors import CheckpointError
from serving.util.files import write_bytes, write_text
from serving.util.finite import FLOAT32_MAX
from serving.util.typed_json import json_text, parse_json

State = Mapping[str, Tensor]
Layout = Literal["hugging_face", "openai"]

_HUGGING_FACE = {
    "image.encoder.patch_embedding": "vision_model.embeddings.patch_embedding",
    "image.encoder.class_embedding": "vision_model.embeddings.class_embedding",
    "image.encoder.position_embedding": "vision_model.embeddings.position_embedding.weight",
    "image.encoder.pre_norm": "vision_model.pre_layrnorm",  # sic
    "image.encoder.post_norm": "vision_model.post_layernorm",
    "image.encoder.projection": "visual_projection",
    "image.encoder.blocks": "vision_model.encoder.layers",
    "text.token_embedding": "text_model.embeddings.token_embedding",
    "text.position_embedding": "text_model.embeddings.position_embedding.weight",
    "text.post_norm": "text_model.final_layer_norm",
    "text.projection": "text_projection",
    "text.blocks": "text_model.encoder.layers",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attention.query.": ".self_attn.q_proj.",
    ".attention.key.": ".self_attn.k_proj.",
    ".attention.value.": ".self_attn.v_proj.",
    ".attention.output.": ".self_attn.out_proj.",
    ".mlp.up.": ".mlp.fc1.",
    ".mlp.down.": ".mlp.fc2.",
}
_OPENAI = {
    "image.encoder.attention.output": "visual.attnpool.c_proj",
    "image.encoder.attention.query": "visual.attnpool.q_proj",
    "image.encoder.attention.key": "visual.attnpool.k_proj",
    "image.encoder.attention.value": "visual.attnpool.v_proj",
    "image.encoder.patch_embedding": "visual.conv1",
    "image.encoder.class_embedding": "visual.class_embedding",
    "image.encoder.pre_norm": "visual.ln_pre",
    "image.encoder.post_norm": "visual.ln_post",
    "image.encoder.projection.weight": "visual.proj",
    "image.encoder.blocks": "visual.transformer.resblocks",
    "image.encoder.": "visual.",
    ".shortcut.1.": ".downsample.0.",
    ".shortcut.2.": ".downsample.1.",
    "text.token_embedding": "token_embedding",
    "text.position_embedding": "positional_embedding",
    "text.post_norm": "ln_final",
    "text.projection.weight": "text_projection",
    "text.blocks": "transformer.resblocks",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attention.output.": ".attn.out_proj.",
    ".attention.": ".attn.",
    ".mlp.up.": ".mlp.c_fc.",
    ".mlp.down.": ".mlp.c_proj.",
}
# Constants that some files contain in addition to the weights.
_IGNORED = re.compile(
    r"(input_resolution|context_length|vocab_size|attn_mask|.*position_ids|.*num_batches_tracked)$"
)


def hugging_face_name(name: str) -> str:
    """Translate the name of one of our parameters to that in `transformers.CLIPModel`."""
    for ours, theirs in _HUGGING_FACE.items():
        name = name.replace(ours, theirs)
    return name


def openai_name(name: str) -> str:
    """Translate the name of one of our parameters to that in OpenAI's `CLIP`, once unpacked."""
    if name == "image.encoder.position_embedding":
        return "visual.positional_embedding"  # `unpack_openai` gives a ResNet's the same name
    name = re.sub(r"image\.encoder\.stages\.(\d)", lambda m: f"visual.layer{int(m[1]) + 1}", name)
    for ours, theirs in _OPENAI.items():
        name = name.replace(ours, theirs)
    return name


def unpack_openai(state: State) -> dict[str, Tensor]:
    """Split packed attention matrices, and transpose projections to the layout of `nn.Linear`."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((".in_proj_weight", ".in_proj_bias")):
            stem, kind = name.rsplit(".in_proj_", 1)
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"{stem}.{part}.{kind}"] = chunk
        elif name in ("visual.proj", "text_projection"):
            out[name] = tensor.T
        elif name == "visual.attnpool.positional_embedding":
            out["visual.positional_embedding"] = tensor
        else:
            out[name] = tensor
    return out


def pack_openai(state: State) -> dict[str, Tensor]:
    """Reverse `unpack_openai`."""
    out: dict[str, Tensor] = {}
    resnet = "visual.attnpool.q_proj.weight" in state
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*\.attn)\.query\.(weight|bias)", name):
            parts = [state[f"{match[1]}.{part}.{match[2]}"] for part in ("query", "key", "value")]
            out[f"{match[1]}.in_proj_{match[2]}"] = torch.cat(parts)
        elif re.fullmatch(r".*\.attn\.(key|value)\.(weight|bias)", name):
            continue
        elif name in ("visual.proj", "text_projection"):
            out[name] = tensor.T
        elif resnet and name == "visual.positional_embedding":
            out["visual.attnpool.positional_embedding"] = tensor
        else:
            out[name] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _namer(layout: Layout) -> Callable[[str], str]:
    return hugging_face_name if layout == "hugging_face" else openai_name


def to_layout(clip: Clip, layout: Layout) -> dict[str, Tensor]:
    """Return the weights of `clip` as a state dict in the given layout, float32, contiguous."""
    rename = _namer(layout)
    state = {
        rename(name): tensor.detach().float().contiguous()
        for name, tensor in clip.state_dict().items()
        if not _IGNORED.match(name)
    }
    return state if layout == "hugging_face" else pack_openai(state)


def check_state(clip: Clip, state: State, layout: Layout) -> None:
    """Check that `state` fits `clip`, which may be on the meta device.

    Raises:
        CheckpointError: a weight is missing, unknown, not floating point, or has another shape than
            in `clip`; or a value of it is one that no trained model has.
    """
    theirs, wanted = _matched(clip, state, layout)
    shapes = {name: tuple(tensor.shape) for name, tensor in clip.state_dict().items()}
    for name, target in wanted.items():
        got, expected = tuple(theirs[name].shape), shapes[target]
        if got != expected:
            raise CheckpointError(
                f"weight {name!r} has shape {list(got)}, but the checkpoint's configuration needs "
                f"{list(expected)}; configuration and weights may be of different models"
            )
        if not theirs[name].is_floating_point():
            raise CheckpointError(
                f"it has dtype {theirs[name].dtype}; expected floating-point numbers",
                name=f"weight {name}",
                advice="use a checkpoint that is not quantized",
            )
        if name.endswith("running_var") and theirs[name].min() < 0:
            raise CheckpointError(
                f"a variance is {theirs[name].min().item():g}; expected 0 or more",
                name=f"weight {name}",
            )
    logarithm = theirs["logit_scale"].float()
    if not 0 < (scale := logarithm.exp().item()) <= FLOAT32_MAX:
        raise CheckpointError(
            f"the logit scale is e^{logarithm.item():g} = {scale:g}; expected a number greater "
            "than 0 and finite in float32",
            name="weight logit_scale",
            advice="store the logarithm of the scale, such as 4.605 for a scale of 100",
        )


def load_state(clip: Clip, state: State, layout: Layout) -> None:
    """Copy `state`, which fits `clip`, into it, as float32. See `check_state`."""
    theirs, wanted = _matched(clip, state, layout)
    clip.load_state_dict(
        {target: theirs[name].float() for name, target in wanted.items()}, strict=False
    )


def _matched(clip: Clip, state: State, layout: Layout) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the unpacked `state`, and the name of a parameter of `clip` for each of its weights.

    Raises:
        CheckpointError: a weight is missing or unknown.
    """
    rename = _namer(layout)
    theirs = dict(state) if layout == "hugging_face" else unpack_openai(state)
    wanted = {rename(name): name for name in clip.state_dict() if not _IGNORED.match(name)}
    missing = sorted(wanted.keys() - theirs.keys())
    extra = sorted(name for name in theirs.keys() - wanted.keys() if not _IGNORED.match(name))
    if missing or extra:
        raise CheckpointError(
            "the weights are not those of a plain CLIP: "
            f"{_some(missing, 'missing')}, {_some(extra, 'unknown')}"
        )
    return theirs, wanted


def _some(names: list[str], adjective: str) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {adjective}" + (f" ({shown})" if names else "")


def save_checkpoint(
    directory: Path,
    clip: Clip,
    image: ImageSpec,
    tokenizer: tokenizers.Tokenizer,
    templates: Sequence[str] = (),
) -> None:
    """Write `clip` as a checkpoint directory that this project loads.

    A ViT is written in Hugging Face's layout, which `transformers.CLIPModel.from_pretrained` reads,
    a ResNet in OpenCLIP's. Every file is written under a temporary name and then renamed.

    Args:
        directory: directory to write to; it is created if needed.
        clip: both towers.
        image: preprocessing of the image tower.
        tokenizer: tokenizer in CLIP's format.
        templates: zero-shot prompt templates, such as "a photo of a {}.".

    Raises:
        CheckpointError: the tokenizer has no start-of-text token.
    """
    start_id = tokenizer.token_to_id("<|startoftext|>")
    if start_id is None:
        raise CheckpointError("the tokenizer has no <|startoftext|>; expected CLIP's format")
    prompts = {"prompt_templates": list(templates)} if templates else {}
    resize = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[image.interpolation]
    if isinstance(clip.config.image, ResNetConfig):
        layout: Layout = "openai"
        weights = "open_clip_model.safetensors"
        documents = {"open_clip_config.json": config_to_open_clip(clip.config, image) | prompts}
    else:
        layout, weights = "hugging_face", "model.safetensors"
        documents = {
            "config.json": config_to_hugging_face(clip.config, start_id) | prompts,
            "preprocessor_config.json": {
                "image_processor_type": "CLIPImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": image.resize}
                if image.resize_mode == "shortest"
                else {"height": image.resize, "width": image.resize},
                "resample": resize,
                "do_center_crop": True,
                "crop_size": {"height": image.size, "width": image.size},
                "do_convert_rgb": True,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(image.mean),
                "image_std": list(image.std),
            },
        }
    write_bytes(directory / weights, save(to_layout(clip, layout), metadata={"format": "pt"}))
    for name, document in {**documents, "tokenizer.json": parse_json(tokenizer.to_str())}.items():
        write_text(directory / name, json_text(document, indent=2, ascii_only=False) + "\n")
