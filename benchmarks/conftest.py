"""A bundle of random ViT-B/32 weights, made once and kept in artifacts/."""

from pathlib import Path

import pytest

from export.build import build
from export.checkpoint import load_checkpoint
from serving.bundle import Bundle
from serving.commands import silent

PATH = Path("artifacts/random-ViT-B-32")


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """Of the true architecture, for latency."""
    if PATH.exists():
        return Bundle.open(PATH)
    return build(load_checkpoint("random:ViT-B-32"), PATH, silent)
