"""What is timed and against what, made once a session, and what the results file says of it.

`python -m benchmarks latency` passes these options on.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.latency.candidates import (
    FULL,
    NAMES,
    REFERENCE,
    SHORT,
    Candidate,
    Inputs,
    candidate,
    wanted,
)
from benchmarks.latency.peers import Peer, save_for_peers
from benchmarks.machine.cpu_limits import cpu_limits
from benchmarks.machine.environment import environment
from benchmarks.machine.limits import measure_limits
from export.gate.verify import checkpoint_of
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS, Tower
from serving.errors import ClipDeployError
from serving.runners.base import Runner
from serving.util.nvidia import gpu

PATH = Path("artifacts/random-ViT-B-32")

_LIMITS: pytest.StashKey[dict[str, Any]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this suite."""
    group = parser.getgroup("clip-deploy")
    group.addoption("--bundle", type=Path, default=PATH, help="to measure")
    group.addoption("--full", action="store_true", help="every batch, length and runner")
    group.addoption("--runners", action="append", default=[], help="pattern of runners' names")
    group.addoption("--budget", type=float, default=None, help="seconds a runner and work")


def pytest_configure(config: pytest.Config) -> None:
    """Limits are put here when they are measured."""
    config.stash[_LIMITS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The matrix: all works of a runner one after the other, so that it is opened once."""
    config = metafunc.config
    full, patterns = config.getoption("--full"), tuple(config.getoption("--runners"))
    names = [name for name in NAMES if wanted(name, full=full, patterns=patterns)]
    if "opened" in metafunc.fixturenames:
        pairs = [(tower, name) for tower in TOWERS for name in names]
        ids = [f"{tower}-{name}" for tower, name in pairs]
        metafunc.parametrize("opened", pairs, ids=ids, indirect=True, scope="module")
    if "work" in metafunc.fixturenames:
        metafunc.parametrize("work", FULL if full else SHORT, ids=str)
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop the works of one tower for the runners of the other."""
    items[:] = [item for item in items if _fits(item)]


def _fits(item: pytest.Item) -> bool:
    values: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    both = {"opened", "work"} <= set(values)
    return not both or values["opened"][0] == values["work"].tower


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """What is measured."""
    path: Path = request.config.getoption("--bundle")
    return Bundle.open(path)


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> float:
    """Seconds that one runner on one work is timed for, about."""
    given: float | None = request.config.getoption("--budget")
    return given if given is not None else 15.0 if request.config.getoption("--full") else 2.0


@pytest.fixture(scope="session")
def inputs(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The checkpoint behind the bundle, and the same for transformers."""
    scratch, checkpoint = tmp_path_factory.mktemp("scratch"), checkpoint_of(bundle)

    @cache
    def peer() -> Peer:
        return Peer(folder)

    folder = scratch / "checkpoint"
    save_for_peers(checkpoint, bundle, folder)
    return Inputs(bundle=bundle, checkpoint=checkpoint, peer=peer, folder=folder, scratch=scratch)


@pytest.fixture(scope="session")
def references(inputs: Inputs) -> Iterator[dict[Tower, Runner]]:
    """Eager float32 of both towers, open."""
    found = {tower: candidate(inputs, tower, REFERENCE).runner for tower in TOWERS}
    with found["image"], found["text"]:
        yield found


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, inputs: Inputs) -> Iterator[Candidate]:
    """One runner of one tower, open; where it is not to be had, a skip with the reason."""
    tower, name = request.param
    try:
        found = candidate(inputs, tower, name)
        found.runner.__enter__()
    except ClipDeployError as error:
        pytest.skip(f"{name}: {error}")
    yield found
    found.runner.__exit__(None, None, None)


@pytest.fixture(scope="session", autouse=True)
def limits(request: pytest.FixtureRequest) -> Iterator[None]:
    """Measure the machine itself, before and after everything else."""
    found = request.config.stash[_LIMITS]
    measure: dict[str, Callable[[], Any]] = {"cpu": cpu_limits}
    if gpu() is not None:
        measure["cuda"] = lambda: measure_limits("cuda")
    found["limits"] = {device: asdict(call()) for device, call in measure.items()}
    yield
    found["limits_at_end"] = {device: asdict(call()) for device, call in measure.items()}


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """The full record of the machine."""
    machine_info["environment"] = environment()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What was measured of the machine, and which model."""
    found: dict[str, Any] = config.stash[_LIMITS]
    output_json["limits"], output_json["limits_at_end"] = found["limits"], found["limits_at_end"]
    manifest = Bundle.open(config.getoption("--bundle")).manifest
    output_json["bundle"] = {
        "name": manifest.name,
        "architecture": manifest.architecture,
        "weights": manifest.provenance.weights,
        "weights_sha256": manifest.provenance.weights_sha256,
        "source": manifest.provenance.source,
    }
