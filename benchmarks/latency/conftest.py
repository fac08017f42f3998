"""Options and fixtures of the latency benchmark."""

import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.latency.candidates import (
    NAMES,
    REFERENCE,
    WORKS,
    Candidate,
    Inputs,
    candidate,
    wanted,
)
from benchmarks.latency.peers import Peer, save_for_peers
from benchmarks.latency.record import Record
from export.checkpoints.load import load_checkpoint
from export.gate.verify import checkpoint_of
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS, Tower
from serving.errors import ClipDeployError
from serving.runners.base import Runner
from serving.util.results import Device, Matrix

_RECORD: pytest.StashKey[Record] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the command-line options."""
    group = parser.getgroup("clip-deploy")
    group.addoption("--model", default="random:ViT-B-32", help="bundle or checkpoint to measure")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="device")
    group.addoption("--full", action="store_true", help="measure every batch, length and runner")
    group.addoption("--runners", action="append", default=[], help="measure runners that match")
    group.addoption("--budget", type=float, default=None, help="seconds per runner and batch")
    group.addoption(
        "--stop-after", type=float, default=None, help="seconds until the rest is skipped"
    )
    group.addoption("--results", type=Path, default=None, help="directory of results.json")


def pytest_configure(config: pytest.Config) -> None:
    """Create the record and register it as a plugin."""
    record = Record(
        directory=config.getoption("--results"),
        device=config.getoption("--device"),
        matrix="full" if config.getoption("--full") else "short",
        stop_after=config.getoption("--stop-after"),
    )
    config.stash[_RECORD] = record
    config.pluginmanager.register(record)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests so that all works of a runner are consecutive and it is opened once."""
    config = metafunc.config
    device: Device = config.getoption("--device")
    full, patterns = config.getoption("--full"), tuple(config.getoption("--runners"))
    names = [name for name in NAMES[device] if wanted(name, full=full, patterns=patterns)]
    if "opened" in metafunc.fixturenames:
        pairs = [(tower, name) for tower in TOWERS for name in names]
        ids = [f"{tower}-{name}" for tower, name in pairs]
        metafunc.parametrize("opened", pairs, ids=ids, indirect=True, scope="module")
    if "work" in metafunc.fixturenames:
        matrix: Matrix = "full" if full else "short"
        metafunc.parametrize("work", WORKS[device, matrix], ids=str)
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop works of the other tower than the runner's, and on a GPU the tests for CPUs only."""
    on_cpu = config.getoption("--device") == "cpu"
    items[:] = [item for item in items if _fits(item) and (on_cpu or "work" in _values(item))]


def _fits(item: pytest.Item) -> bool:
    values = _values(item)
    both = {"opened", "work"} <= set(values)
    return not both or values["opened"][0] == values["work"].tower


def _values(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Record:
    """Return the record of this run."""
    return request.config.stash[_RECORD]


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> float:
    """Return the approximate seconds per runner and work."""
    given: float | None = request.config.getoption("--budget")
    return given if given is not None else 15.0 if request.config.getoption("--full") else 2.0


@pytest.fixture(scope="session")
def inputs(
    request: pytest.FixtureRequest, record: Record, tmp_path_factory: pytest.TempPathFactory
) -> Inputs:
    """Load the checkpoint and its bundle, if any, and save the checkpoint for the peers."""
    model: str = request.config.getoption("--model")
    bundle = Bundle.open(Path(model)) if (Path(model) / "manifest.json").exists() else None
    checkpoint = load_checkpoint(model) if bundle is None else checkpoint_of(bundle)
    scratch = tmp_path_factory.mktemp("scratch")
    saved = scratch / "checkpoint"

    @cache
    def peer() -> Peer:
        return Peer(saved)

    save_for_peers(checkpoint, saved)
    made = Inputs(bundle=bundle, checkpoint=checkpoint, peer=peer, saved=saved, scratch=scratch)
    record.of(made)
    return made


@pytest.fixture(scope="session", autouse=True)
def _limits(record: Record) -> None:
    """Measure the limits of the device first; the record measures them again at the end."""
    record.limits = record.measure_limits()


@pytest.fixture(scope="session")
def references(inputs: Inputs, record: Record) -> Iterator[dict[Tower, Runner]]:
    """Open eager float32 of both towers."""
    name = REFERENCE[record.device]
    found = {tower: candidate(inputs, tower, name).runner for tower in TOWERS}
    with found["image"], found["text"]:
        yield found


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, inputs: Inputs, record: Record) -> Iterator[Candidate]:
    """Open a runner of a tower; skip its tests, with the reason, if it is not available."""
    tower, name = request.param
    try:
        found = candidate(inputs, tower, name)
        found.runner.__enter__()
    except (ClipDeployError, ImportError) as error:
        record.leave_out(f"{tower} tower, {name}", str(error))
    yield found
    found.runner.__exit__(None, None, None)
    if name.startswith("compiled"):
        torch._dynamo.reset()  # the limit of recompilations counts over all towers
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
