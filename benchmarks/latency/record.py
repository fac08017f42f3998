"""Record of a latency run: a pytest plugin that writes the run to `results.json`."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from benchmarks.latency.candidates import REFERENCE, Inputs
from benchmarks.machine.cpu_limits import cpu_limits
from benchmarks.machine.environment import environment
from benchmarks.machine.limits import measure_limits
from export.pipeline import architecture_of
from serving.bundles.bundle import Bundle
from serving.errors import ClipDeployError
from serving.util.files import write_text
from serving.util.results import (
    FILE,
    Device,
    Environment,
    Footprint,
    LatencyRun,
    LeftOut,
    Limits,
    Matrix,
    Model,
    Results,
    StageLatency,
    TowerLatency,
)
from serving.util.typed_json import json_text

PARTIAL = "latency.partial.json"
"""File with the unfinished run, rewritten after each measurement and removed at the end."""


@dataclass(kw_only=True)
class Record:
    """Measurements of a run so far.

    Args:
        directory: directory of `results.json`; None: write nothing.
        stop_after: seconds after which no further measurement is started.
    """

    directory: Path | None
    device: Device
    matrix: Matrix
    stop_after: float | None
    environment: Environment = field(default_factory=environment)
    model: Model | None = None
    limits: Limits | None = None
    limits_at_end: Limits | None = None
    towers: list[TowerLatency] = field(default_factory=list)
    stages: list[StageLatency] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def of(self, inputs: Inputs) -> None:
        """Record the model that is measured."""
        checkpoint = inputs.checkpoint
        self.model = Model(
            name=checkpoint.name,
            architecture=architecture_of(checkpoint),
            weights=checkpoint.weights,
            weights_sha256=checkpoint.weights_sha256,
            source=checkpoint.source,
        )

    def measure_limits(self) -> Limits:
        """Measure the limits of the device."""
        return cpu_limits() if self.device == "cpu" else measure_limits(self.device)

    def add(self, entry: TowerLatency | StageLatency | Footprint) -> None:
        """Add a measurement."""
        match entry:
            case TowerLatency():
                self.towers.append(entry)
            case StageLatency():
                self.stages.append(entry)
            case Footprint():
                self.footprints.append(entry)
        if self.directory is not None and (run := self.run()) is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / PARTIAL, json_text(run))

    def leave_out(self, what: str, reason: str) -> NoReturn:
        """Record why something is not measured, and skip the test."""
        self._leave_out(what, reason)
        pytest.skip(f"{what}: {reason}")

    def _leave_out(self, what: str, reason: str) -> None:
        one = LeftOut(what=what, reason=reason)
        if one not in self.left_out:
            self.left_out.append(one)

    def available(self, what: str, make: Callable[[], object]) -> None:
        """Call `make`; skip the test, with the reason, if something that it needs is missing."""
        try:
            make()
        except (ClipDeployError, ImportError) as error:
            self.leave_out(what, str(error))

    def bundle_of(self, inputs: Inputs, what: str) -> Bundle:
        """Return the bundle; skip the test if a checkpoint without a bundle is measured."""
        if inputs.bundle is None:
            self.leave_out(what, "requires a bundle, and a checkpoint without one is measured")
        return inputs.bundle

    def run(self) -> LatencyRun | None:
        """Return the run, or None if nothing was measured."""
        measured = self.towers or self.stages or self.footprints
        if not measured or self.model is None or self.limits is None:
            return None
        return LatencyRun(
            environment=self.environment,
            model=self.model,
            device=self.device,
            matrix=self.matrix,
            reference=REFERENCE[self.device],
            limits=self.limits,
            limits_at_end=self.limits_at_end,
            towers=tuple(self.towers),
            stages=tuple(self.stages),
            footprints=tuple(self.footprints),
            left_out=tuple(self.left_out),
        )

    def publish(self) -> None:
        """Write the run to `results.json`, replacing an older one with the same key."""
        run = self.run()
        if self.directory is None or run is None:
            return
        file = self.directory / FILE
        results = Results.read(file) if file.exists() else Results()
        results.with_latency(run).write(file)
        (self.directory / PARTIAL).unlink(missing_ok=True)

    @pytest.hookimpl
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip the test once `stop_after` has passed."""
        spent = time.monotonic() - self._started
        if self.stop_after is not None and spent > self.stop_after:
            self.leave_out(item.name, f"the time limit of {self.stop_after:g} s was reached")

    @pytest.hookimpl
    def pytest_exception_interact(
        self, node: pytest.Item | pytest.Collector, call: pytest.CallInfo[object]
    ) -> None:
        """Record a failed test as left out."""
        if call.excinfo is not None:
            self._leave_out(node.name, call.excinfo.exconly().splitlines()[0])

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        """Publish the run, also after an interruption."""
        if self.limits is not None and self.towers:
            with suppress(RuntimeError):  # a runner may have left the GPU in a failed state
                self.limits_at_end = self.measure_limits()
        self.publish()
