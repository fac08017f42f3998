"""JPEG files -> embeddings through the embedded Triton, against a loop around eager float32.

Client and server share this machine. Both sides decode and resize with the same code; rounds of the
two alternate, and each number is a median.
"""

import io
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from export.build import checkpoint_of
from export.calibration import probe_images
from export.torch_runners import EagerRunner
from serving.bundle import Bundle
from serving.client import ClipClient
from serving.commands import Steps
from serving.preprocess import preprocess
from serving.repository import assemble, assembled_latencies
from serving.triton import TritonServer

EAGER_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Pictures a second, each way."""

    pictures: int
    size: tuple[int, int]
    runner: str
    served_per_s: float
    eager_per_s: float
    speedup: float
    latency_ms: float
    """Median of one picture at a time through the server."""
    largest_difference: float
    """Between the two sides' embeddings."""
    rounds: int


def jpegs(count: int, size: tuple[int, int] = (640, 480)) -> list[bytes]:
    """Encoded pictures with structure, each its own."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        grid = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        buffer = io.BytesIO()
        grid.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def served(
    bundle: Bundle,
    repository: Path,
    count: int,
    rounds: int,
    progress: Steps,
    *,
    runner: str = "auto",
    batch_size: int = 16,
    in_flight: int = 8,
) -> Served:
    """Measure both ways over `count` pictures of 640x480."""
    checkpoint = checkpoint_of(bundle)
    progress("assembling", 0, 0)
    assemble(bundle, repository, runner=runner)
    chosen = runner
    if runner == "auto":
        chosen = next(t.runner for t in assembled_latencies(repository) if t.tower == "image")
    pictures = jpegs(count)
    serve_s, eager_s, alone_s = [], [], []
    with (
        TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server,
        ClipClient(server.grpc_url, batch_size=batch_size, in_flight=in_flight) as client,
        EagerRunner(checkpoint.clip.image) as eager,
    ):
        spec = bundle.manifest.image

        def loop() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            starts = range(0, count, EAGER_BATCH)
            batches = (
                np.stack([preprocess(p, spec) for p in pictures[s : s + EAGER_BATCH]])
                for s in starts
            )
            return np.concatenate([eager.run(batch) for batch in batches])

        client.embed_images(pictures)
        mine = theirs = eager.run(probe_images(spec, 1))
        for turn in range(rounds):
            start = time.perf_counter()
            mine = client.embed_images(pictures)
            serve_s.append(time.perf_counter() - start)
            start = time.perf_counter()
            theirs = loop()
            eager_s.append(time.perf_counter() - start)
            for picture in pictures[:10]:
                start = time.perf_counter()
                client.embed_images([picture])
                alone_s.append(time.perf_counter() - start)
            progress("served and eager", turn + 1, rounds)
    return Served(
        pictures=count,
        size=(640, 480),
        runner=chosen,
        served_per_s=count / statistics.median(serve_s),
        eager_per_s=count / statistics.median(eager_s),
        speedup=statistics.median(eager_s) / statistics.median(serve_s),
        latency_ms=statistics.median(alone_s) * 1e3,
        largest_difference=float(np.abs(mine - theirs).max()),
        rounds=rounds,
    )
