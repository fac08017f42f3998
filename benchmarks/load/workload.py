"""Requests of the load benchmark, and the interface of its clients.

Each request has one image or one text, as from independent users; the server forms the batches.
"""

import io
import random
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from serving.bundles.bundle import Bundle
from serving.inputs.tokenizer import Tokenizer

Wire = Literal["grpc", "http"]
Model = Literal["clip_image", "clip_text"]
Mode = Literal["concurrency", "rate"]

SIZES = ((320, 240), (640, 480), (1280, 960), (480, 640))
"""Width and height of the images in pixels, in equal shares."""
IMAGES_PER_SIZE = 8
TEXTS = 8192
BUCKET_COUNTS = (8, 5, 3, 2, 1, 1)
"""Number of texts per length bucket of the tokenizer, shortest first, in each group of 20 texts.
Captions are mostly short. With fixed groups, short and long measurements have the same mix."""
WINDOWS = 3
"""Number of windows in a measurement."""
STEADY = 0.10
"""Tolerated relative difference between the windows of a stable measurement."""
_DIGITS = 6
_WORDS = """
    red green blue yellow purple orange white black grey brown small large round square bright dark
    circle star heart arrow moon tree house river cat dog bird horse boat train street table chair
    window garden bridge field mountain photo picture drawing painting sketch of a the near above
    below beside behind with and two three four many old new wooden
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests to a model, with one item each; clients cycle through them in this order."""

    model: Model
    tensor: str
    """Name of the ensemble's input."""
    items: tuple[bytes, ...]
    mix: str
    """Description of the items for reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load of one measurement."""

    workload: Workload
    wire: Wire
    address: str
    """host:port"""
    mode: Mode
    load: float
    """Requests in flight, or requests/s at random times (Poisson), depending on `mode`."""
    window_s: float
    """Duration of a window in seconds; WINDOWS of them are measured."""
    admin_key: str | None = None
    """Key for the server's statistics, which perf_analyzer requires."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurement of a client."""

    throughput_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int
    stable: bool
    """True: the windows agree; see `steady`."""
    cpu_share: float
    """CPU time of the client, as a share of the CPUs that it may use."""


class Client(Protocol):
    """Client that generates load."""

    @property
    def name(self) -> Literal["perf_analyzer", "asyncio"]:
        """Name in the results."""

    def measure(self, load: Load) -> Measured:
        """Generate `load` and measure it.

        Raises:
            ServerError: the measurement failed.
        """


def steady(throughputs: Sequence[float], latencies: Sequence[float]) -> bool:
    """Return whether the windows differ by at most STEADY in throughput and in mean latency.

    This is perf_analyzer's definition of stable: the ratio of the largest to the smallest value
    over three windows (`--stability-percentage` in its docs/cli.md). Random arrivals are rarely
    stable in windows of a few hundred requests.
    """
    return all(max(values) <= min(values) * (1 + STEADY) for values in (throughputs, latencies))


def jpegs(count: int, size: tuple[int, int] = (640, 480)) -> list[bytes]:
    """Return `count` different JPEG files with structured content; `size` is width and height."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        grid = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        buffer = io.BytesIO()
        grid.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def mixed_pictures() -> Workload:
    """Return a workload of JPEG files of all SIZES, shuffled."""
    items = [item for size in SIZES for item in jpegs(IMAGES_PER_SIZE, size)]
    order = np.random.default_rng(0).permutation(len(items))
    sizes = ", ".join(f"{width}x{height}" for width, height in SIZES)
    kilobytes = sum(map(len, items)) / len(items) / 1e3
    return Workload(
        model="clip_image",
        tensor="image",
        items=tuple(items[index] for index in order),
        mix=f"JPEG files of {sizes} in equal shares, {kilobytes:.0f} kB on average",
    )


def mixed_texts(bundle: Bundle, seed: int, count: int = TEXTS) -> Workload:
    """Return a workload of `count` different texts, with lengths according to BUCKET_COUNTS.

    Texts differ between seeds, so that no response cache contains them. Each text starts with a
    unique number; the shortest ones consist only of it.
    """
    spec = bundle.manifest.text
    tokenizer, vocabulary = Tokenizer(bundle.tokenizer, spec), _WORDS.split()
    # Words and digits are tokenized separately, so their token counts add up.
    costs = {
        word: int((tokenizer([word])[0] == spec.end_id).argmax()) - 1
        for word in (*vocabulary, *string.digits)
    }
    shortest = (2 + _DIGITS, *(bucket + 1 for bucket in spec.buckets[:-1]))
    ranges = list(zip(shortest, spec.buckets, strict=True))
    deck = [limits for limits, n in zip(ranges, BUCKET_COUNTS, strict=False) for _ in range(n)]
    rng = random.Random(seed)
    texts: dict[str, int] = {}
    while len(texts) < count:
        index = len(texts) % len(deck)
        if not index:
            rng.shuffle(deck)
        least, bucket = deck[index]
        wanted = rng.randint(min(least, bucket), bucket)
        number = (seed * TEXTS + len(texts)) % 10**_DIGITS  # unique
        words = [f"{number:0{_DIGITS}}"]
        length = 2 + sum(costs[digit] for digit in words[0])
        for word in rng.choices(vocabulary, k=wanted):
            if length + costs[word] <= wanted:
                words.append(word)
                length += costs[word]
        texts[" ".join(words)] = next(b for b in spec.buckets if b >= length)
    counted = sorted(Counter(texts.values()).items())
    shares = ", ".join(f"{bucket}: {number / count:.0%}" for bucket, number in counted)
    return Workload(
        model="clip_text",
        tensor="text",
        items=tuple(text.encode() for text in texts),
        mix=f"{count} different texts per measurement; shares of token buckets {shares}",
    )
