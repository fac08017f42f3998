"""Fixtures: a Ray cluster, images, and a finished job."""

import faulthandler
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from PIL import Image

from serving.bulk.ray_pool import Resources
from serving.clients.local import LocalClip
from tests.support.bulk_data import RUNNER, run


@pytest.fixture(scope="module")
def cluster(request):
    """One Ray cluster for the module. `bulk_embed` uses a running cluster."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=128 << 20,
    )
    yield
    ray.shutdown()
    # Ray 2.60 removes the crash handlers: a later crash would end pytest without a message.
    faulthandler.enable(request.config.stash[fault_handler_stderr_fd_key])


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """300 small images in nested directories."""
    root = tmp_path_factory.mktemp("many") / "pictures"
    rng = np.random.default_rng(1)
    for index in range(300):
        folder = root / f"{index % 7}" / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        grid = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        grid.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{index:03}.jpg")
    return root


@pytest.fixture(scope="module")
def local(fp32_bundle):
    with LocalClip(fp32_bundle.path, RUNNER) as clip:
        yield clip


@pytest.fixture(scope="module")
def finished(cluster, fp32_bundle, many, tmp_path_factory):
    """The outcome of a finished job over `many` with two workers. Do not change it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return run(many, out, fp32_bundle, resources=Resources(workers=2), shard_size=64)
