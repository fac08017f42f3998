"""Zero-shot accuracy of every runner of a bundle on labelled images, against eager float32.

Both towers use the same runner, as in deployment; the parity gate replaces one tower at a time.
Labels are inserted into prompt templates, and the embeddings are averaged as in Radford et al.
2021, section 3.1.4, and in `zeroshot_classifier` of OpenAI's notebook
Prompt_Engineering_for_ImageNet: normalize, average, normalize.

The runners take turns of a few batches. Each image is decoded once, memory holds the pixels of one
turn whatever the size of the data set, and drift of the machine affects all runners alike. Only the
runners of one tower are open at a time. Latencies are milliseconds per item of the tower alone: the
median over full batches. Texts are padded to their length bucket, for eager float32 as well.

The directory of images has one of two layouts:
- `DIR/LABEL/*.jpg`, as read by torchvision's ImageFolder. Labels are the names of the
  subdirectories, or those in `DIR/classnames.txt` (one `directory, name` per line).
- Flat, with `captions.txt` (one `file, label` per line), and with `labels.txt` if only some
  captions are labels. `python -m training pictures` writes this layout, and
  `clip-deploy export --labelled` reads it.

ImageNetV2 (Recht et al. 2019), matched-frequency, has 10,000 images in the directories `0` to
`999`. To measure it, write OpenAI's 1,000 class names to `classnames.txt` and the 80 templates of
the notebook above to a file, both in the notebook's order, and run
`python -m benchmarks accuracy BUNDLE DIR --templates FILE`. The reference value for OpenAI's
ViT-B/32 is 55.93 % top-1. A version of the notebook with `missile` twice among the class names
prints 55.73 %, and 83.45 % top-5. This project has not run it.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.intervals import paired_difference, wilson
from benchmarks.accuracy.labelled import read_folder
from benchmarks.machine.environment import environment
from benchmarks.machine.timing import once
from export.gate.torch_runners import EagerRunner, TorchScriptRunner
from export.gate.verify import checkpoint_of
from export.pipeline import tower_of
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS, ImageSpec, Tower
from serving.errors import ImageError, InputError, RunnerError, TextError, worded
from serving.inputs.labels import LabelSet
from serving.inputs.preprocess import preprocess
from serving.inputs.tokenizer import Tokenizer
from serving.runners.base import Batch, Embeddings, Runner
from serving.runners.registry import missing, open_runner
from serving.runners.spec import runners_of
from serving.tasks.zero_shot import ClassEmbeddings
from serving.util.progress import Progress
from serving.util.results import AccuracyRow, AccuracyRun, LeftOut

REFERENCE = "eager:fp32"
BATCH = 32
"""Images or texts in a batch."""
METHODS = {
    "top1": "Wilson's score interval",
    "difference": "Tango's score interval for paired proportions",
}
"""Methods of the 95 % intervals."""

_TURN = 8
"""Batches per turn. A runner first runs the first batch once untimed."""


@dataclass(slots=True)
class _Model:
    """Both towers with one runner, and the results of them."""

    name: str
    runners: dict[Tower, Runner]
    labels: list[Embeddings] = field(default_factory=list)
    top: list[NDArray[np.intp]] = field(default_factory=list)
    timings: dict[Tower, list[tuple[int, float]]] = field(
        default_factory=lambda: {tower: [] for tower in TOWERS}
    )
    """Number of items and seconds of each batch."""

    def milliseconds(self, tower: Tower) -> float:
        """Return the milliseconds per item: the median over full batches."""
        full = self.batch(tower)
        return statistics.median(s for n, s in self.timings[tower] if n == full) / full * 1e3

    def batch(self, tower: Tower) -> int:
        """Return the number of items in a full batch."""
        return max(n for n, _ in self.timings[tower])


def accuracy(
    bundle: Bundle,
    directory: Path,
    progress: Progress,
    *,
    templates: Sequence[str] | None = None,
    patterns: Sequence[str] = ("*",),
    limit: int | None = None,
) -> AccuracyRun:
    """Classify the images of `directory` with every runner that is available here.

    Args:
        bundle: bundle to measure.
        directory: labelled images, in a layout that the module docstring describes.
        progress: receives the steps.
        templates: prompt templates, each with a `{}`. Default: the templates of the checkpoint.
        patterns: patterns of runner names, such as `openvino:*`. Eager float32 always runs.
        limit: maximum number of images, spread evenly over the directory.

    Raises:
        InputError: the directory has no labelled images, or none of them can be read.
        TextError: a template has no `{}`, or makes a label too long for the model.
        RunnerError: no runner matches a pattern.
        CheckpointError: the checkpoint that the bundle was exported from does not exist any more.
    """
    here, data = environment(), read_folder(directory)
    # Labels that share a name are embedded once, so that their scores tie exactly.
    names = list(dict.fromkeys(data.labels))
    columns = [names.index(label) for label in data.labels]
    texts = LabelSet(tuple(names), tuple(templates or bundle.manifest.templates))
    left_out: dict[str, str] = {}
    models = _models(bundle, patterns, left_out)

    def keep_labels(model: _Model, embeddings: Embeddings) -> None:
        some = ClassEmbeddings(len(embeddings) // len(texts.templates), len(texts.templates))
        some.add(range(len(embeddings)), embeddings)
        model.labels.append(some.unit())

    def keep_top(model: _Model, embeddings: Embeddings) -> None:
        scores = (embeddings @ np.concatenate(model.labels).T)[:, columns]
        top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
        top[~np.isfinite(scores).all(axis=1)] = -1
        model.top.append(top)

    tokenizer = Tokenizer(bundle.tokenizer, bundle.manifest.text)
    turns = _text_turns(texts, tokenizer, progress)
    models = _take_turns(models, "text", turns, keep_labels, left_out)
    chosen = _spread(len(data.files), limit)
    skipped: list[str] = []
    kept: list[int] = []
    files = {index: data.files[index] for index in chosen}
    turns = _image_turns(files, bundle.manifest.image, kept, skipped, progress)
    models = _take_turns(models, "image", turns, keep_top, left_out)
    if not kept:
        raise InputError(
            f"{directory}: none of the images can be read; the first error: {skipped[0]}"
        )
    truth = np.array([data.truth[index] for index in kept])
    notes = list(data.notes)
    if bundle.manifest.provenance.weights == "random":
        notes.insert(0, "the weights are random: the accuracy is that of guessing")
    return AccuracyRun(
        environment=here,
        bundle=bundle.manifest.name,
        weights=bundle.manifest.provenance.weights,
        dataset=directory.name,
        images=len(kept),
        labels=len(data.labels),
        templates=texts.templates,
        image_batch=models[0].batch("image"),
        text_batch=models[0].batch("text"),
        skipped=tuple(skipped),
        left_out=tuple(LeftOut(what=name, reason=why) for name, why in left_out.items()),
        notes=tuple(notes),
        methods=METHODS,
        rows=tuple(_rows(bundle, models, truth, len(data.labels))),
    )


def _models(bundle: Bundle, patterns: Sequence[str], left_out: dict[str, str]) -> list[_Model]:
    """Return eager float32, and the runners of both towers that match a pattern."""
    found = {tower: _runners(bundle, tower) for tower in TOWERS}
    names = list(dict.fromkeys(name for tower in TOWERS for name in found[tower]))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in [REFERENCE, *names]):
            raise RunnerError(
                f"no runner of {bundle.path} matches {pattern!r}",
                advice=f"choose from {', '.join(names)}",
            )
    checkpoint = checkpoint_of(bundle)
    eager = {tower: EagerRunner(tower_of(checkpoint, tower)) for tower in TOWERS}
    models = [_Model(REFERENCE, dict(eager))]
    for name in names:
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        has = [tower for tower in TOWERS if name in found[tower]]
        if len(has) == len(TOWERS):
            models.append(_Model(name, {tower: found[tower][name] for tower in TOWERS}))
        else:
            left_out[name] = f"available for the {has[0]} tower only"
    return models


def _runners(bundle: Bundle, tower: Tower) -> dict[str, Runner]:
    """Return the available runners of the bundle's artifacts of one tower, by name."""
    found: dict[str, Runner] = {}
    for artifact in bundle.manifest.artifacts:
        if artifact.graph != tower:
            continue
        if artifact.kind == "torchscript":
            traced = TorchScriptRunner(bundle.verified(artifact))
            found[traced.name] = traced
        here = [spec for spec in runners_of(artifact) if missing(spec) is None]
        found |= {str(spec): open_runner(bundle, tower, spec) for spec in here}
    return found


def _take_turns(
    models: list[_Model],
    tower: Tower,
    turns: Iterator[list[Batch]],
    keep: Callable[[_Model, Embeddings], None],
    left_out: dict[str, str],
) -> list[_Model]:
    """Run every batch with every model, and return the models that could run all of them."""
    with ExitStack() as stack:
        able = []
        for model in models:
            try:
                stack.enter_context(model.runners[tower])
            except RunnerError as error:  # for example bfloat16 on a CPU without support for it
                left_out[model.name] = worded(error.reason, error.advice)
                continue
            able.append(model)
        for batches in turns:
            for model in list(able):
                try:
                    keep(model, _timed(model, tower, batches))
                except RunnerError as error:
                    if model.name == REFERENCE:
                        raise
                    left_out[model.name] = worded(error.reason, error.advice)
                    able.remove(model)
    return able


def _timed(model: _Model, tower: Tower, batches: list[Batch]) -> Embeddings:
    runner, parts = model.runners[tower], []
    runner.run(batches[0])  # untimed: the previous runner left cold caches and spinning threads
    for batch in batches:
        embeddings, seconds = once(partial(runner.run, batch))
        parts.append(embeddings)
        model.timings[tower].append((len(batch), seconds))
    return np.concatenate(parts)


def _text_turns(texts: LabelSet, tokenizer: Tokenizer, progress: Progress) -> Iterator[list[Batch]]:
    count = len(texts.templates)
    step = max(1, _TURN * BATCH // count) * count
    for start in range(0, len(texts), step):
        progress("labels", start // count, len(texts.labels))
        some = texts.texts(start, start + step)
        try:
            rows = tokenizer.encode(some)
        except TextError as error:
            raise texts.blamed(error, range(start, len(texts))) from error
        batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        lengths = [tokenizer.bucket(max(map(len, batch))) for batch in batches]
        yield [tokenizer.padded(b, length) for b, length in zip(batches, lengths, strict=True)]


def _image_turns(
    files: dict[int, Path],
    spec: ImageSpec,
    kept: list[int],
    skipped: list[str],
    progress: Progress,
) -> Iterator[list[Batch]]:
    pixels: list[NDArray[np.uint8]] = []
    for done, (index, file) in enumerate(files.items(), 1):
        try:
            pixels.append(preprocess(file, spec))
            kept.append(index)
        except ImageError as error:
            skipped.append(str(error))
        if len(pixels) == _TURN * BATCH or (done == len(files) and pixels):
            progress("images", done, len(files))
            yield [np.stack(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
            pixels.clear()


def _spread(count: int, limit: int | None) -> list[int]:
    """Return at most `limit` of `count` indices, evenly spaced, as files are sorted by label."""
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def _rows(
    bundle: Bundle, models: list[_Model], truth: NDArray[np.intp], labels: int
) -> list[AccuracyRow]:
    tops = {model.name: np.concatenate(model.top) for model in models}
    first = tops[REFERENCE][:, 0]
    expected = first == truth
    rows = []
    for model in models:
        top = tops[model.name]
        right = top[:, 0] == truth
        low, high = wilson(int(right.sum()), len(truth))
        gained, lost = int((right & ~expected).sum()), int((expected & ~right).sum())
        itself = model.name == REFERENCE
        less, more = (0.0, 0.0) if itself else paired_difference(gained, lost, len(truth))
        rows.append(
            AccuracyRow(
                runner=model.name,
                top1=float(right.mean()),
                top1_low=low,
                top1_high=high,
                top5=float((top == truth[:, None]).any(axis=1).mean()) if labels > 5 else None,
                agreement=float((top[:, 0] == first).mean()),
                difference=(gained - lost) / len(truth),
                difference_low=less,
                difference_high=more,
                passed=_passed(bundle, model.name),
                image_ms=model.milliseconds("image"),
                text_ms=model.milliseconds("text"),
            )
        )
    return [rows[0], *sorted(rows[1:], key=lambda row: -row.top1)]


def _passed(bundle: Bundle, name: str) -> bool | None:
    every = [
        a
        for a in bundle.manifest.artifacts
        if a.graph in TOWERS and any(v.runner == name for v in a.verdicts)
    ]
    passed = {tower: [a.passed(name) for a in every if a.tower == tower] for tower in TOWERS}
    if any(verdicts and not any(verdicts) for verdicts in passed.values()):
        return False
    return True if all(passed.values()) else None
