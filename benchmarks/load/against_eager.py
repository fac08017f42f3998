"""Throughput from JPEG files to embeddings: a served bundle against a loop around eager float32.

Both sides decode and resize with the same code. Their rounds alternate, and each number is a
median.
"""

import statistics
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.workload import jpegs
from benchmarks.machine.timing import once
from export.gate.torch_runners import EagerRunner
from export.gate.verify import checkpoint_of
from serving.bundles.bundle import Bundle
from serving.clients.triton import ClipClient
from serving.errors import ServerError
from serving.inputs.preprocess import preprocess
from serving.util.progress import Progress
from serving.util.results import AgainstEager

EAGER_BATCH = 32
_BATCH_SIZE, _IN_FLIGHT = 16, 8
_SIZE = (640, 480)
_ALONE = 10


def against_eager(
    bundle: Bundle, url: str, count: int, rounds: int, progress: Progress, *, runner: str | None
) -> AgainstEager:
    """Measure both sides on `count` images of 640x480 pixels.

    Args:
        bundle: bundle that the server at `url` serves.
        url: URL of the server.
        count: number of images.
        rounds: number of rounds of each side.
        progress: receives the rounds.
        runner: name of the image tower's runner, for the result.

    Raises:
        CheckpointError: the checkpoint of the bundle does not exist any more.
        ServerError: the server did not answer, or its embeddings have another dimension.
    """
    progress("comparing with eager fp32")
    checkpoint, spec = checkpoint_of(bundle), bundle.manifest.image
    images = jpegs(count, _SIZE)
    serve_s, eager_s, alone_s, differences = [], [], [], []
    with (
        ClipClient(url, batch_size=_BATCH_SIZE, in_flight=_IN_FLIGHT) as client,
        EagerRunner(checkpoint.clip.image) as eager,
    ):

        def loop() -> NDArray[np.float32]:
            parts = (images[s : s + EAGER_BATCH] for s in range(0, count, EAGER_BATCH))
            batches = (np.stack([preprocess(i, spec) for i in part]) for part in parts)
            return np.concatenate([eager.run(batch) for batch in batches])

        client.embed_images(images)
        eager.run(np.stack([preprocess(image, spec) for image in images[:EAGER_BATCH]]))
        for turn in range(rounds):
            mine, seconds = once(partial(client.embed_images, images))
            serve_s.append(seconds)
            theirs, seconds = once(loop)
            eager_s.append(seconds)
            if mine.shape != theirs.shape:
                raise ServerError(
                    f"{url} serves another model than {bundle.path}: its embeddings have "
                    f"{mine.shape[1]} dimensions, not {theirs.shape[1]}",
                    advice="give the bundle that the server serves",
                )
            differences.append(float(np.abs(mine - theirs).max()))
            for image in images[:_ALONE]:
                _, seconds = once(partial(client.embed_images, [image]))
                alone_s.append(seconds)
            progress("comparing with eager fp32", turn + 1, rounds)
    return AgainstEager(
        images=count,
        size=_SIZE,
        runner=runner,
        served_per_s=count / statistics.median(serve_s),
        eager_per_s=count / statistics.median(eager_s),
        speedup=statistics.median(eager_s) / statistics.median(serve_s),
        latency_ms=statistics.median(alone_s) * 1e3,
        largest_difference=max(differences),
        rounds=rounds,
    )
