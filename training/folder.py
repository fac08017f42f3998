"""Training on a directory of captioned images, from scratch or from a checkpoint."""

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
"""Channels per attention head. CLIP's 64 would leave small transformers with very few heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a model trained from scratch. The defaults suit a few thousand pairs on a CPU."""

    tower: Literal["vit", "resnet"] = "vit"
    image_size: int = 64
    patch_size: int = 8
    """Patch size of a ViT."""
    width: int = 128
    """Channels of a ViT, or of a ResNet's stem. A ResNet's last stage has 32 times as many."""
    layers: int = 4
    """Blocks of a ViT, or of each of a ResNet's four stages."""
    text_width: int = 128
    text_layers: int = 3
    embed_dim: int = 128
    context_length: int = 77
    vocabulary: int = 2000


@dataclass(frozen=True, slots=True)
class FolderReport:
    """Facts about a checkpoint trained on a directory."""

    output: str
    images: int
    captions: int
    steps: int
    parameters: int
    first_loss: float
    """Loss of the first step, in nats."""
    last_loss: float
    """Loss of the last step, in nats."""


def image_spec(sizes: Sizes) -> ImageSpec:
    """Return the preprocessing, with the pipeline of the library whose layout the tower has."""
    return ImageSpec(
        size=sizes.image_size,
        resize=sizes.image_size,
        interpolation="bicubic",
        mean=IMAGE.mean,
        std=IMAGE.std,
        pipeline="huggingface" if sizes.tower == "vit" else "openai",
    )


def build_clip(sizes: Sizes, text: TextSpec) -> Clip:
    """Return a newly initialized model.

    Raises:
        InputError: the sizes do not fit each other.
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
            heads=sizes.width // 2,  # 64 channels per head, as in all of OpenAI's ResNets
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
        folder: directory of images with a listing of captions.
        output: directory to write to.
        state: file with the state of the run; it is deleted at the end.
        settings: settings of the run.
        sizes: sizes of the model. They are ignored with `start`.
        start: checkpoint to start from; its tokenizer is kept.
        resume: continue from `state`.
        progress: called with each step.

    Raises:
        InputError: the listing, an image or a caption cannot be used, or the sizes do not fit.
        CheckpointError: `start` cannot be loaded, or there is no matching state to resume.
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
