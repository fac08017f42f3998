"""Contrastive training loop: symmetric InfoNCE with a learnable logit scale.

The optimizer is AdamW with warm-up, cosine decay and clipped gradients. The loop uses no random
numbers: the captions of a step depend only on the seed and on the number of the step. A stopped run
therefore continues bit for bit from its last saved state, and the same settings on the same machine
give the same weights.

`training.demo` and `training.folder` load the data and save the trained model.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.towers.clip import Clip
from export.towers.resnet import ResNetConfig
from serving.errors import CheckpointError, InputError
from serving.util.files import new_file
from serving.util.finite import is_float32
from serving.util.progress import Progress, silent
from training.batches import MixedBatches, Pairs

MAX_LOGIT_SCALE = math.log(100)
"""Maximum logarithm of the logit scale. Radford et al. 2021, section 2.5: a scale above 100 made
training unstable."""
_REPORT_EVERY = 100
"""Steps between two reports of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a training run. A saved state can only be resumed with the same settings."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    threads: int = 2
    """Number of CPU threads. It affects the results, since it changes the order of sums."""
    projections_only: bool = False
    """Freeze both towers; train only their projections and the logit scale."""
    checkpoint_every: int = 500
    """Steps between two saved states."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: a setting is negative, or not finite in float32.
        """
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not (is_float32(value) and value >= 0):
                raise InputError(f"expected a finite number, 0 or more, got {value:g}", name=name)


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute the symmetric InfoNCE loss. Row i of `image` belongs to row i of `text`.

    Args:
        image: unit vectors, float32 [batch, dim].
        text: unit vectors, float32 [batch, dim].
        logit_scale: logarithm of the logit scale, a scalar.

    Returns:
        The mean of both cross entropies, in nats, a scalar.
    """
    logits = logit_scale.exp() * image @ text.T
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def learning_rate(step: int, settings: Settings) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay towards 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def trainable(clip: Clip, projections_only: bool) -> dict[str, nn.Parameter]:
    """Return the parameters to train, by name, and disable the gradients of all others."""
    encoder = clip.image.encoder
    last = getattr(encoder, "projection", None) or encoder.get_submodule("attention.output")
    projections = {id(p) for m in (last, clip.text.projection) for p in m.parameters()}
    projections.add(id(clip.logit_scale))
    for parameter in clip.parameters():
        parameter.requires_grad_(not projections_only or id(parameter) in projections)
    return {name: p for name, p in clip.named_parameters() if p.requires_grad}


def make_optimizer(clip: Clip, settings: Settings) -> torch.optim.AdamW:
    """Return an AdamW optimizer with weight decay for matrices and convolution kernels only.

    Norms, biases, embeddings and the logit scale have no weight decay.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in trainable(clip, settings.projections_only).items():
        embedding = name.endswith(("position_embedding", "token_embedding.weight"))
        (not_decayed if embedding or parameter.ndim < 2 else decayed).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": not_decayed, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
    )


def train(
    clip: Clip,
    pairs: Pairs,
    settings: Settings,
    state: Path,
    resume: bool = False,
    progress: Progress = silent,
) -> list[float]:
    """Train `clip` in place.

    Args:
        clip: the model.
        pairs: the training data.
        settings: settings of the run.
        state: file that the state of the run is written to, every `checkpoint_every` steps.
        resume: continue from `state`. The final weights are the same as without an interruption.
        progress: called with loss and speed.

    Returns:
        The loss of every step, in nats.

    Raises:
        InputError: there are fewer pairs than one batch needs, or the loss is not finite.
        CheckpointError: with `resume`, `state` is missing or was written with other settings.
    """
    batches = MixedBatches(pairs.kinds, settings.batch_size, settings.seed)
    optimizer = make_optimizer(clip, settings)
    losses = load_state(state, clip, optimizer, settings) if resume else []
    # Frozen towers stay in eval mode, so that batch norms do not update their running averages.
    clip.train(not settings.projections_only)
    started, first = time.monotonic(), len(losses)
    with reproducible(settings.threads // _parts(clip, settings)):
        for step in range(first, settings.steps):
            losses.append(_step(clip, optimizer, pairs, batches(step), step, settings))
            if (step + 1) % settings.checkpoint_every == 0:
                save_state(state, clip, optimizer, settings, losses)
            speed = (step + 1 - first) * settings.batch_size / (time.monotonic() - started)
            if step % _REPORT_EVERY == 0 or step + 1 == settings.steps:
                figures = f"training, loss {losses[-1]:.3f}, {speed:.0f} pairs/s"
                progress(figures, step + 1, settings.steps)
    clip.eval()
    return losses


def _step(
    clip: Clip,
    optimizer: torch.optim.Optimizer,
    pairs: Pairs,
    chosen: Tensor,
    step: int,
    settings: Settings,
) -> float:
    """Run one training step and return the loss before the update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    input_ids = pairs.input_ids[chosen]
    # Texts are cut to the longest one of the batch, since padding does not affect embeddings.
    ends = (input_ids == clip.text.config.end_id).int().argmax(dim=1)
    pixels = pairs.pixels[pairs.picture_of[chosen]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss = _backward(clip, parameters, pixels, input_ids[:, : int(ends.max()) + 1], settings)
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(
            f"training diverged at step {step}: the loss is {loss:g}, the norm of its gradient "
            f"{norm:g}",
            advice="give a smaller learning rate",
        )
    optimizer.step()
    with torch.no_grad():
        clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    return loss.item()


def _backward(
    clip: Clip,
    parameters: list[nn.Parameter],
    pixels: Tensor,
    input_ids: Tensor,
    settings: Settings,
) -> Tensor:
    """Set the gradients of `parameters` and return the loss.

    Each thread computes the towers for one part of the batch. Parallelism inside each operation is
    slower, since its threads synchronize thousands of times per step: 66 pairs/s instead of
    181 pairs/s, in batches of 64 on two cores shared with other work. The loss is still that of the
    whole batch: its gradients with respect to the embeddings are computed first, and then
    propagated through the towers in parts.
    """
    parts = _parts(clip, settings)
    size = -(-len(pixels) // parts)
    weights = [p for p in parameters if p is not clip.logit_scale]

    def embed(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return clip.image(part[0]), clip.text(part[1])

    def propagate(job: tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(job[0], weights, job[1])

    with ThreadPoolExecutor(parts) as threads:
        split = zip(torch.split(pixels, size), torch.split(input_ids, size), strict=True)
        embedded = list(threads.map(embed, split))
        images, texts = (
            torch.cat([part[i].detach() for part in embedded]).requires_grad_() for i in range(2)
        )
        loss = info_nce(images, texts, clip.logit_scale)
        by_image, by_text, by_scale = torch.autograd.grad(loss, (images, texts, clip.logit_scale))
        split_by = zip(torch.split(by_image, size), torch.split(by_text, size), strict=True)
        partial = list(threads.map(propagate, zip(embedded, split_by, strict=True)))
    for parameter, *gradients in zip(weights, *partial, strict=True):
        parameter.grad = sum(gradients[1:], gradients[0])
    clip.logit_scale.grad = by_scale
    return loss.detach()


def _parts(clip: Clip, settings: Settings) -> int:
    """Return the number of parts of a batch; 1 for a ResNet, whose batch norms need all of it."""
    return 1 if isinstance(clip.image.config, ResNetConfig) else settings.threads


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Use deterministic algorithms on a fixed number of threads, and restore both on exit."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def save_state(
    path: Path,
    clip: Clip,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    losses: list[float],
) -> None:
    """Write the state that a run needs to continue. The file is replaced atomically."""
    content = {
        "clip": clip.state_dict(),
        "optimizer": optimizer.state_dict(),
        "settings": asdict(settings),
        "losses": losses,
    }
    with new_file(path) as file:
        torch.save(content, file)


def load_state(
    path: Path, clip: Clip, optimizer: torch.optim.Optimizer, settings: Settings
) -> list[float]:
    """Load the state of a run into `clip` and `optimizer`.

    Returns:
        The losses of the steps so far.

    Raises:
        CheckpointError: the file is missing, or was written with other settings.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: there is no run to resume", advice="leave out --resume"
        )
    content = torch.load(path, weights_only=True)
    expected, found = asdict(settings), content["settings"]
    changed = [f"{k} {found.get(k)} (now {v})" for k, v in expected.items() if found.get(k) != v]
    if changed:
        raise CheckpointError(
            f"{path} was written with other settings: {', '.join(changed)}",
            advice="resume with the same settings, or leave out --resume",
        )
    clip.load_state_dict(content["clip"])
    optimizer.load_state_dict(content["optimizer"])
    losses: list[float] = content["losses"]
    return losses


def plot_losses(losses: list[float], path: Path) -> None:
    """Plot the loss of every step and its running mean to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(losses, color="0.8", linewidth=0.5, label="one step")
    mean, means = losses[0], []
    for loss in losses:
        mean += 0.02 * (loss - mean)
        means.append(mean)
    axes.plot(means, color="C0", label="running mean")
    axes.set(xlabel="step", ylabel="InfoNCE loss (nats)")
    axes.legend()
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=80)
