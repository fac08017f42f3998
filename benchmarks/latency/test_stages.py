"""Latency of each stage from encoded images or strings to embeddings, and of the whole pipeline.

Each stage is timed in turns with the whole pipeline of transformers' documentation: `CLIPModel`
with its processor and tokenizer, from the same bytes and strings.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.latency.candidates import Inputs
from benchmarks.latency.record import Record
from benchmarks.latency.turns import Turns
from benchmarks.load.workload import jpegs
from benchmarks.machine.timing import timing_of
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS, Tower
from serving.clients.local import LocalClip
from serving.inputs.decode import decode
from serving.inputs.preprocess import to_pixels
from serving.inputs.tokenizer import Tokenizer
from serving.runners.autotune import fastest
from serving.runners.registry import open_runner
from serving.util.results import StageLatency

IMAGES, TEXTS, TOKENS = 4, 8, 10
PASSES = 50
"""Repetitions of a tokenizer per call, as one pass takes 0.2 ms, too short to be timed."""
_QUICK = ("text: tokenize", "text: transformers tokenizer")
_WORDS = (
    *("a", "red", "dog", "by", "the", "sea", "an", "old", "man", "at", "night", "snow", "on"),
    *("one", "house", "two", "cats", "in", "my", "park"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of a pipeline, or a whole pipeline."""

    name: str
    tower: Tower
    runner: str
    items: int
    """Images or texts per call."""
    call: Callable[[], Any]


NAMES = (
    *(f"image: {part}" for part in ("decode", "resize", "tower", "together")),
    *(f"image: transformers {part}" for part in ("processor", "tower", "together")),
    *(f"text: {part}" for part in ("tokenize", "tower", "together")),
    *(f"text: transformers {part}" for part in ("tokenizer", "tower", "together", "longest")),
)


@pytest.fixture(scope="module")
def stages(record: Record, inputs: Inputs) -> Iterator[dict[str, Stage]]:
    """Return every stage, with the fastest runners that passed the parity gate."""
    bundle = record.bundle_of(inputs, "stages")
    chosen: dict[Tower, str] = {tower: str(fastest(bundle, tower)) for tower in TOWERS}
    with (
        open_runner(bundle, "image", chosen["image"]) as images,
        open_runner(bundle, "text", chosen["text"]) as texts,
        LocalClip(bundle.path, chosen["image"]) as image_clip,
        LocalClip(bundle.path, chosen["text"]) as text_clip,
    ):
        calls = _image_calls(bundle, inputs, images.run, image_clip)
        calls |= _text_calls(bundle, inputs, texts.run, text_clip)
        yield {name: _stage(name, call, chosen) for name, call in calls.items()}


def _stage(name: str, call: Callable[[], Any], chosen: dict[Tower, str]) -> Stage:
    tower: Tower = "image" if name.startswith("image") else "text"
    runner = "transformers:fp32" if "transformers" in name else chosen[tower]
    items = IMAGES if tower == "image" else TEXTS
    if name in _QUICK:
        items, call = items * PASSES, partial(_again, call)
    return Stage(name=name, tower=tower, runner=runner, items=items, call=call)


def _again(call: Callable[[], Any]) -> None:
    for _ in range(PASSES):
        call()


def _image_calls(
    bundle: Bundle, inputs: Inputs, run: Callable[[Any], Any], clip: LocalClip
) -> dict[str, Callable[[], Any]]:
    spec, peer = bundle.manifest.image, inputs.peer()
    encoded = jpegs(IMAGES)
    decoded = [decode(data) for data in encoded]
    pixels = np.stack([to_pixels(image, spec) for image in decoded])
    floats = peer.images(decoded)

    def theirs() -> Any:
        return peer.embed("image", peer.images([decode(data) for data in encoded]))

    return {
        "image: decode": lambda: [decode(data) for data in encoded],
        "image: resize": lambda: [to_pixels(image, spec) for image in decoded],
        "image: tower": partial(run, pixels),
        "image: together": partial(clip.embed_images, encoded),
        "image: transformers processor": lambda: peer.images(decoded),
        "image: transformers tower": partial(peer.embed, "image", floats),
        "image: transformers together": theirs,
    }


def _text_calls(
    bundle: Bundle, inputs: Inputs, run: Callable[[Any], Any], clip: LocalClip
) -> dict[str, Callable[[], Any]]:
    peer = inputs.peer()
    spec = bundle.manifest.text
    tokenizer = Tokenizer(bundle.tokenizer, spec)
    strings = [caption(tokenizer, spec.context_length, number) for number in range(TEXTS)]
    rows, padded = tokenizer.encode(strings), peer.texts(strings, "max_length")
    ids = tokenizer.padded(
        rows, max(map(len, rows))
    )  # as in LocalClip, which does not pad to buckets

    def theirs(padding: Any) -> Any:
        return peer.embed("text", peer.texts(strings, padding))

    return {
        "text: tokenize": partial(tokenizer, strings),
        "text: tower": partial(run, ids),
        "text: together": partial(clip.embed_texts, strings),
        "text: transformers tokenizer": partial(peer.texts, strings, "max_length"),
        "text: transformers tower": partial(peer.embed, "text", padded),
        "text: transformers together": partial(theirs, "max_length"),
        "text: transformers longest": partial(theirs, "longest"),
    }


def caption(tokenizer: Tokenizer, context_length: int, number: int) -> str:
    """Return as many words as fit into TOKENS; without a vocabulary, each letter is a token."""
    words = _WORDS[number:] + _WORDS[:number]
    most = min(TOKENS, context_length - 1)  # a truncated text fills the whole context
    fitting = [
        text
        for count in range(1, len(words))
        if len(tokenizer.encode([text := " ".join(words[:count])], truncate=True)[0]) <= most
    ]
    return fitting[-1] if fitting else words[0]


@pytest.mark.parametrize("stage", NAMES)
def test_stage(
    benchmark: BenchmarkFixture,
    record: Record,
    stages: dict[str, Stage],
    stage: str,
    budget: float,
) -> None:
    """Time one stage on JPEG files of 640x480 pixels, or on captions of at most TOKENS tokens."""
    mine = stages[stage]
    turns = Turns(stages[f"{mine.tower}: transformers together"].call, mine.call)
    benchmark.group = f"{mine.tower} pipeline"
    benchmark.pedantic(mine.call, setup=turns.setup, rounds=turns.rounds(budget / 3))  # type: ignore[no-untyped-call]
    if benchmark.stats is None:  # --benchmark-disable
        return
    data = benchmark.stats.stats.data
    record.add(
        StageLatency(
            stage=stage,
            tower=mine.tower,
            items=mine.items,
            runner=mine.runner,
            timing=timing_of(data),
            reference_ms=turns.reference_ms,
            ratios=turns.ratios(data),
        )
    )
