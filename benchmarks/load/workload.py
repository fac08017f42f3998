"""What is asked of a server under load, and what its clients tell of it.

One request carries one picture or one text, as independent users send them; the server makes its
batches itself.
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
"""Width and height of the pictures, in equal shares."""
PICTURES_A_SIZE = 8
TEXTS = 8192
BUCKET_COUNTS = (8, 5, 3, 2, 1, 1)
"""Texts of each of the tokenizer's length buckets, shortest first, among any 20 that follow each
other: captions are short, and a short measurement has the same mix as a long one."""
WINDOWS = 3
STEADY = 0.10
_DIGITS = 6
_WORDS = """
    red green blue yellow purple orange white black grey brown small large round square bright dark
    circle star heart arrow moon tree house river cat dog bird horse boat train street table chair
    window garden bridge field mountain photo picture drawing painting sketch of a the near above
    below beside behind with and two three four many old new wooden
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one model, each one item; clients take them in this order, round and round."""

    model: Model
    tensor: str
    """The ensemble's input."""
    items: tuple[bytes, ...]
    mix: str
    """What the items are, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one measurement asks of a server."""

    workload: Workload
    wire: Wire
    address: str
    """host:port"""
    mode: Mode
    load: float
    """Requests under way at a time, or requests a second at random moments (Poisson)."""
    window_s: float
    """WINDOWS of them are measured."""
    admin_key: str | None = None
    """With which perf_analyzer reads the server's statistics; it cannot do without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a client saw."""

    throughput_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int
    stable: bool
    cpu_share: float
    """CPU time that the client itself took, of all CPUs that it may use."""


class Client(Protocol):
    """What puts load on a server."""

    @property
    def name(self) -> Literal["perf_analyzer", "asyncio"]:
        """As results call it."""

    def measure(self, load: Load) -> Measured:
        """Put `load` on the server.

        Raises:
            ServerError: nothing could be measured.
        """


def steady(throughputs: Sequence[float], latencies: Sequence[float]) -> bool:
    """Are the windows' throughputs, and their mean latencies, within STEADY of each other?

    That is what perf_analyzer calls stable: the ratio of the largest to the smallest, over three
    windows (`--stability-percentage` in its docs/cli.md). Random arrivals seldom are, in windows of
    a few hundred requests.
    """
    return all(max(values) <= min(values) * (1 + STEADY) for values in (throughputs, latencies))


def jpegs(count: int, size: tuple[int, int] = (640, 480)) -> list[bytes]:
    """Encoded pictures with structure, each its own; `size` is width and height."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        grid = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        buffer = io.BytesIO()
        grid.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def mixed_pictures() -> Workload:
    """JPEG files of all SIZES, shuffled."""
    items = [item for size in SIZES for item in jpegs(PICTURES_A_SIZE, size)]
    order = np.random.default_rng(0).permutation(len(items))
    sizes = ", ".join(f"{width}x{height}" for width, height in SIZES)
    kilobytes = sum(map(len, items)) / len(items) / 1e3
    return Workload(
        model="clip_image",
        tensor="image",
        items=tuple(items[place] for place in order),
        mix=f"JPEG files of {sizes} in equal shares, {kilobytes:.0f} kB in the mean",
    )


def mixed_texts(bundle: Bundle, seed: int, count: int = TEXTS) -> Workload:
    """`count` different texts, whose lengths fill the model's buckets by BUCKET_COUNTS.

    The texts of another `seed` are others, so that no response cache knows them. Each begins with a
    number, and the shortest are no more than that.
    """
    spec = bundle.manifest.text
    tokenizer, vocabulary = Tokenizer(bundle.tokenizer, spec), _WORDS.split()
    # Words and digits are split before they are merged to tokens, so lengths add up.
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
        place = len(texts) % len(deck)
        if not place:
            rng.shuffle(deck)
        least, bucket = deck[place]
        wanted = rng.randint(min(least, bucket), bucket)
        number = (seed * TEXTS + len(texts)) % 10**_DIGITS  # no other text has it
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
        mix=f"{count} different texts a measurement; shares of token buckets {shares}",
    )
