"""The model card of the demo checkpoint: what it is, how it was made, what was measured."""

import platform
from dataclasses import dataclass

import torch

from training.contrastive import Settings
from training.shapes import COLOURS, HELD_OUT, SHAPES, label

CARD = """\
# shapes-clip

A small CLIP ({parameters:,} parameters, 64 x 64 pixels) that knows {shapes} shapes in {colours}
colours, their sizes and places, and their backgrounds. Trained from nothing on drawn pictures; made
to be deployed, tested and measured, not to see the world.

Shapes: {shape_names}.
Colours: {colour_names}.

## Measured

Zero-shot top-1 over all {pairs} captions `a <colour> <shape>` (templates `{{}}`, `a photo of {{}}`,
`a picture of {{}}`), on pictures of one thing drawn with a fresh seed ({test_seed}) at
{test_size} pixels:

| pictures | n | accuracy |
|---|---|---|
| pairs seen in training | {seen_count} | {seen:.1%} |
| pairs held out | {held_out_count} | {held_out:.1%} |
| two things, told from the same with swapped colours | {couple_count} | {binding:.1%} |

Held out, neither drawn nor described in training: {held_out_names}.

## Made by

    python -m training shapes --seed {seed} --steps {steps} --pictures {pictures_asked}

{pictures:,} pictures with two captions each, {steps:,} steps of {batch_size} pairs: portraits and
singles in line-ups that differ in shape only, couples that differ by a swap of colours only.
Symmetric InfoNCE, AdamW, peak learning rate {learning_rate:g}. Drawing took {drawing_s:.0f} s and
training {training_s:.0f} s on {threads} threads ({machine}, torch {torch}). The same command on the
same machine gives the same weights, bit for bit. The last loss is {loss:.3f} nats; `loss.png` has
the curve.

Hugging Face layout: `transformers.CLIPModel.from_pretrained` loads it unchanged.
"""


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What was made and how good it is; accuracies 0..1."""

    output: str
    seed: int
    steps: int
    images: int
    parameters: int
    drawing_s: float
    training_s: float
    loss: float
    test_seed: int
    seen: float
    held_out: float
    binding: float


def card(
    report: DemoReport,
    settings: Settings,
    pictures_asked: int,
    test_size: int,
    counts: tuple[int, int, int],
) -> str:
    """The card as Markdown.

    Args:
        report: what was measured.
        settings: of the training run.
        pictures_asked: the number of pictures in the command, before rounding to whole chunks.
        test_size: pixels the test pictures were drawn at.
        counts: test pictures of seen pairs, of held-out pairs, of couples.
    """
    return CARD.format(
        parameters=report.parameters,
        shapes=len(SHAPES),
        colours=len(COLOURS),
        shape_names=", ".join(SHAPES),
        colour_names=", ".join(COLOURS),
        pairs=len(SHAPES) * len(COLOURS),
        test_seed=report.test_seed,
        test_size=test_size,
        seen_count=counts[0],
        seen=report.seen,
        held_out_count=counts[1],
        held_out=report.held_out,
        couple_count=counts[2],
        binding=report.binding,
        held_out_names=", ".join(label(pair) for pair in HELD_OUT),
        seed=report.seed,
        steps=report.steps,
        pictures_asked=pictures_asked,
        pictures=report.images,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        drawing_s=report.drawing_s,
        training_s=report.training_s,
        threads=settings.threads,
        machine=platform.machine(),
        torch=torch.__version__,
        loss=report.loss,
    )
