"""Training of the demo checkpoint `assets/shapes-clip`, with its accuracy and model card."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.checkpoints.weight_names import save_checkpoint
from export.towers.clip import Clip, ClipConfig, TextConfig, VisionTransformerConfig
from serving.bundles.manifest import ImageSpec, TextSpec
from serving.util.files import write_text
from serving.util.progress import Progress, silent
from training.batches import PairKind, Pairs
from training.card import DemoReport, card
from training.contrastive import Settings, plot_losses, reproducible, train
from training.dataset import encode, text_spec, train_tokenizer
from training.initialise import initialise
from training.measure import Model, binding_accuracy, zero_shot_accuracy
from training.pool import CAPTIONS, KINDS, Drawn, draw_pool
from training.shapes import HELD_OUT, SEEN

IMAGE = ImageSpec(
    size=64,
    resize=64,
    interpolation="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),  # OpenAI's, clip/clip.py:_transform
    std=(0.26862954, 0.26130258, 0.27577711),
    pipeline="huggingface",
)
CONTEXT_LENGTH = 32
VOCABULARY = 700
TEMPLATES = ("{}", "a photo of {}", "a picture of {}")
SHARES = {"portrait": 0.25, "single": 0.5, "couple": 0.25}
"""Share of each kind of picture in a batch."""
PORTRAIT_STEPS = 600
"""Initial steps with portraits only. With other pictures, the model learns shapes much later."""
FIRST_SCALE = 40.0
"""Initial logit scale. With CLIP's own, 14, the model learns colors but hardly any shapes."""
TEST_SIZE = 256
TEST_PICTURES = 2610, 1300, 1000
"""Number of test pictures: of seen pairs (30 each), of held-out pairs (100 each), of couples."""


def default_settings(steps: int, seed: int) -> Settings:
    """Return the settings of the shipped checkpoint."""
    return Settings(
        steps=steps,
        batch_size=64,
        learning_rate=8e-4,
        warmup_steps=min(100, steps // 10),
        seed=seed,
    )


def build_clip(text: TextSpec) -> Clip:
    """Return a new model of the shipped architecture, with about 1.2 million parameters."""
    image = VisionTransformerConfig(
        image_size=IMAGE.size,
        patch_size=8,
        width=128,
        layers=4,
        heads=4,
        mlp_width=512,
        activation="quick_gelu",
    )
    words = TextConfig(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        end_id=text.end_id,
        width=96,
        layers=3,
        heads=4,
        mlp_width=384,
        activation="quick_gelu",
    )
    return Clip(ClipConfig(embed_dim=128, image=image, text=words), IMAGE.mean, IMAGE.std)


def make_pairs(drawn: dict[str, Drawn], input_ids: Tensor) -> Pairs:
    """Return training pairs of the pictures of all kinds. A batch has all pictures of a group.

    Args:
        drawn: pictures by kind.
        input_ids: token ids of the captions in `drawn`, in its order, int32 [captions, length].
    """
    kinds, first = {}, 0
    for kind, part in drawn.items():
        captions = torch.arange(first, first + len(part.captions) * CAPTIONS)
        members = KINDS[kind].members
        # [groups, members, CAPTIONS] -> [groups * CAPTIONS, members]
        groups = captions.view(-1, members, CAPTIONS).transpose(1, 2).reshape(-1, members)
        kinds[kind] = PairKind(groups, SHARES[kind], 0 if kind == "portrait" else PORTRAIT_STEPS)
        first += len(captions)
    pixels = torch.from_numpy(np.concatenate([part.pixels for part in drawn.values()]))
    pictures = torch.arange(len(pixels)).repeat_interleave(CAPTIONS)
    return Pairs(pixels=pixels, input_ids=input_ids, picture_of=pictures, kinds=kinds)


def make_demo(
    output: Path,
    state: Path,
    settings: Settings,
    pictures: int,
    workers: int,
    resume: bool,
    progress: Progress = silent,
) -> DemoReport:
    """Train the demo checkpoint and write it to `output`, with its model card and loss curve.

    Args:
        output: directory to write to.
        state: file with the state of the run; it is deleted at the end.
        settings: settings of the run.
        pictures: number of pictures to draw for training, over all kinds.
        workers: number of processes that draw. It does not affect the pictures.
        resume: continue from `state`.
        progress: called with each step.
    """
    started = time.monotonic()
    counts = {kind: math.ceil(pictures * SHARES[kind]) for kind in KINDS}
    drawn = draw_pool(counts, IMAGE, settings.seed, workers, progress)
    captions = [text for part in drawn.values() for texts in part.captions for text in texts]
    tokenizer = train_tokenizer(captions, VOCABULARY)
    spec = text_spec(tokenizer, CONTEXT_LENGTH)
    pairs = make_pairs(drawn, encode(tokenizer, spec, captions))
    drawing_s = time.monotonic() - started

    torch.manual_seed(settings.seed)
    clip = build_clip(spec)
    with reproducible(settings.threads):
        initialise(clip.image, pairs.pixels[:: max(1, len(pairs.pixels) // 1000)])
    torch.nn.init.constant_(clip.logit_scale, math.log(FIRST_SCALE))
    losses = train(clip, pairs, settings, state, resume, progress)
    training_s = time.monotonic() - started - drawing_s

    save_checkpoint(output, clip, IMAGE, tokenizer, TEMPLATES)
    plot_losses(losses, output / "loss.png")
    model = Model(clip, IMAGE, tokenizer, spec)
    test_seed = settings.seed + 1_000_000
    seen, held_out = (
        zero_shot_accuracy(model, TEMPLATES, part, test_seed, count, TEST_SIZE, progress)
        for part, count in zip((SEEN, HELD_OUT), TEST_PICTURES, strict=False)
    )
    report = DemoReport(
        output=str(output),
        seed=settings.seed,
        steps=settings.steps,
        images=len(pairs.pixels),
        parameters=sum(parameter.numel() for parameter in clip.parameters()),
        drawing_s=round(drawing_s, 1),
        training_s=round(training_s, 1),
        loss=sum(losses[-100:]) / len(losses[-100:]),
        test_seed=test_seed,
        seen=seen,
        held_out=held_out,
        binding=binding_accuracy(model, test_seed, TEST_PICTURES[2], TEST_SIZE),
    )
    text = card(report, settings, pictures, TEST_SIZE, TEST_PICTURES)
    write_text(output / "README.md", text)
    state.unlink(missing_ok=True)
    return report
