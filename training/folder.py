"""Trains a CLIP on a folder of captioned pictures, from nothing or from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from export.checkpoints.load import load_checkpoint
from export.checkpoints.weight_names import save_checkpoint
from export.towers.clip import Clip, ClipConfig, TextConfig, VisionTransformerConfig
from export.towers.resnet import ResNetConfig
from serving.bundles.manifest import DEFAULT_TEMPLATES, ImageSpec, TextSpec
from serving.errors import InputError
from serving.util.progress import Progress, silent
from training.batches import PairKind, Pairs
from training.contrastive import Settings, plot_losses, reproducible, train
from training.dataset import encode, load_pixels, read_folder, text_spec, train_tokenizer
from training.demo import IMAGE
from training.initialise import initialise
from training.measure import Model

HEAD = 32
"""Channels of an attention head in the transformers, of which small ones need more than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a model trained from nothing; the defaults suit some thousand pairs on a CPU."""

    tower: Literal["vit", "resnet"] = "vit"
    image_size: int = 64
    patch_size: int = 8
    """Of a ViT."""
    width: int = 128
    """Channels of a ViT, or of a ResNet's stem; a ResNet ends with 32 times as many."""
    layers: int = 4
    """Blocks of a ViT, or of each of a ResNet's four stages."""
    text_width: int = 128
    text_layers: int = 3
    embed_dim: int = 128
    context_length: int = 77
    vocabulary: int = 2000


@dataclass(frozen=True, slots=True)
class FolderReport:
    """What was made."""

    output: str
    images: int
    captions: int
    steps: int
    parameters: int
    first_loss: float
    last_loss: float
    """In nats."""


def image_spec(sizes: Sizes) -> ImageSpec:
    """Preprocessing in the convention of the library that the tower's layout belongs to."""
    return ImageSpec(
        size=sizes.image_size,
        resize=sizes.image_size,
        interpolation="bicubic",
        mean=IMAGE.mean,
        std=IMAGE.std,
        pipeline="huggingface" if sizes.tower == "vit" else "openai",
    )


def build_clip(sizes: Sizes, text: TextSpec) -> Clip:
    """Fresh towers.

    Raises:
        InputError: sizes that do not fit each other.
    """
    step = sizes.patch_size if sizes.tower == "vit" else 32
    if sizes.image_size % step:
        raise InputError(f"expected an image size divisible by {step}, got {sizes.image_size}")
    for name, width in (("width", sizes.width), ("text width", sizes.text_width)):
        if width % HEAD and (name, sizes.tower) != ("width", "resnet"):
            raise InputError(f"expected a {name} divisible by {HEAD}, got {width}")
    if sizes.tower == "resnet" and sizes.width % 2:
        raise InputError(f"expected an even width, got {sizes.width}")
    image: VisionTransformerConfig | ResNetConfig
    if sizes.tower == "vit":
        image = VisionTransformerConfig(
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            width=sizes.width,
            layers=sizes.layers,
            heads=sizes.width // HEAD,
            mlp_width=4 * sizes.width,
            activation="quick_gelu",
        )
    else:
        image = ResNetConfig(
            image_size=sizes.image_size,
            width=sizes.width,
            layers=(sizes.layers,) * 4,
            heads=sizes.width // 2,  # of 64 channels, as in all of OpenAI's ResNets
        )
    words = TextConfig(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        end_id=text.end_id,
        width=sizes.text_width,
        layers=sizes.text_layers,
        heads=sizes.text_width // HEAD,
        mlp_width=4 * sizes.text_width,
        activation="quick_gelu",
    )
    spec = image_spec(sizes)
    return Clip(ClipConfig(embed_dim=sizes.embed_dim, image=image, text=words), spec.mean, spec.std)


def train_folder(
    folder: Path,
    output: Path,
    state: Path,
    settings: Settings,
    sizes: Sizes,
    start: str | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> FolderReport:
    """Train on the pairs of `folder`, and write the checkpoint and its loss curve to `output`.

    Args:
        state: file that the run's state is kept in until it has ended.
        sizes: of the model; with `start` they are the checkpoint's instead.
        start: a checkpoint to start from, whose tokenizer is kept.

    Raises:
        InputError: listing, pictures or captions that cannot be used, or sizes that do not fit.
        CheckpointError: `start` cannot be loaded, or there is no such run to resume.
    """
    listed = read_folder(folder)
    captions = [caption for _, caption in listed]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    torch.manual_seed(settings.seed)
    if start is None:
        tokenizer = train_tokenizer(captions, sizes.vocabulary)
        text = text_spec(tokenizer, sizes.context_length)
        model = Model(build_clip(sizes, text), image_spec(sizes), tokenizer, text)
    else:
        loaded = load_checkpoint(start)
        model = Model(loaded.clip, loaded.image, loaded.tokenizer, loaded.text)
        templates = loaded.templates
    paths = sorted({path for path, _ in listed})
    numbers = {path: number for number, path in enumerate(paths)}
    pairs = Pairs(
        pixels=load_pixels(paths, model.image, progress),
        input_ids=encode(model.tokenizer, model.text, captions, truncate=True),
        picture_of=torch.tensor([numbers[path] for path, _ in listed]),
        kinds={"pairs": PairKind(torch.arange(len(listed))[:, None], 1.0)},
    )
    if start is None:
        with reproducible(settings.threads):
            initialise(model.clip.image, pairs.pixels[:1000])
    losses = train(model.clip, pairs, settings, state, resume, progress)
    save_checkpoint(output, model.clip, model.image, model.tokenizer, templates)
    plot_losses(losses, output / "loss.png")
    state.unlink(missing_ok=True)
    return FolderReport(
        output=str(output),
        images=len(paths),
        captions=len(captions),
        steps=settings.steps,
        parameters=sum(parameter.numel() for parameter in model.clip.parameters()),
        first_loss=losses[0],
        last_loss=losses[-1],
    )
