"""Model card of the demo checkpoint."""

import platform
from dataclasses import dataclass

import torch

from training.contrastive import Settings
from training.shapes import COLOURS, HELD_OUT, SHAPES, label

CARD = """\
# shapes-clip

A small CLIP model ({parameters:,} parameters, 64 x 64 pixels) for {shapes} shapes in {colours}
colors, with their sizes, positions and backgrounds. It was trained from scratch on drawn pictures,
to test deployment and to measure performance. It does not recognize photos.

Shapes: {shape_names}.
Colors: {colour_names}.

## Accuracy

Zero-shot top-1 accuracy over all {pairs} captions `a <color> <shape>` (prompt templates `{{}}`,
`a photo of {{}}`, `a picture of {{}}`), on pictures of one shape drawn with a new seed
({test_seed}) at {test_size} pixels. The last row is the accuracy of telling a picture of two shapes
from the same picture with swapped colors.

| pictures | n | accuracy |
|---|---|---|
| pairs seen in training | {seen_count} | {seen:.1%} |
| pairs held out | {held_out_count} | {held_out:.1%} |
| two shapes, with their colors or with swapped colors | {couple_count} | {binding:.1%} |

The held-out pairs were neither drawn nor described in training: {held_out_names}.

## Training

    python -m training shapes --seed {seed} --steps {steps} --pictures {pictures_asked}

This command drew {pictures:,} pictures with two captions each and trained for {steps:,} steps of
{batch_size} pairs. A batch has groups of pictures with one shape that differ only in that shape
(portraits and singles), and pairs of pictures with two shapes that differ only by swapped colors
(couples). The loss is symmetric InfoNCE, the optimizer AdamW with a peak learning rate of
{learning_rate:g}. Drawing took {drawing_s:.0f} s and training {training_s:.0f} s on {threads}
threads ({machine}, torch {torch}). The same command on the same machine gives the same weights, bit
for bit. The final loss is {loss:.3f} nats, the mean of the last 100 steps; `loss.png` shows the
curve.

The checkpoint has Hugging Face's layout; `transformers.CLIPModel.from_pretrained` loads it.
"""


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Facts about a trained demo checkpoint. Accuracies are 0..1."""

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
    """Return the model card as Markdown.

    Args:
        report: facts about the checkpoint.
        settings: settings of the training run.
        pictures_asked: requested number of pictures, before rounding to whole chunks.
        test_size: size of the test pictures, in pixels.
        counts: number of test pictures of seen pairs, of held-out pairs, and of couples.
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
