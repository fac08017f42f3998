"""Every runner on an NVIDIA GPU: judged, then timed over batches, beside what the GPU does at best.

A runner is timed host to host (NumPy in, NumPy out: what a server sees) and, where it is PyTorch's,
on the device alone; both are medians of rounds between synchronisations. What may matter most comes
first, so that a budget that runs out costs least, and what was left out is named. The report on
disk is whole after every row.

Does not know: how the device is measured and operations are counted (`limits.py`), what the models
and batches are (`subject.py`), how results are told (`gpu_report.py`).
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu_report import Gate, Plan, Report, Row, Work
from benchmarks.machine.environment import LeftOut, environment
from benchmarks.machine.limits import Limits, count_flops, measure_limits, require, timed
from benchmarks.subject import Subject, load
from export.gate.parity import judge
from export.gate.torch_runners import (
    CompiledRunner,
    EagerRunner,
    Precision,
    TorchRunner,
    TorchScriptRunner,
)
from export.towers.clip import ImageTower, TextTower
from serving.bundles.manifest import TOWERS, Tower, Verdict
from serving.errors import ClipDeployError, RunnerError
from serving.runners.base import Runner
from serving.runners.registry import missing, open_runner
from serving.runners.spec import RUNNERS, library_of
from serving.util.files import write_text
from serving.util.progress import Steps

ROW_SECONDS = 30.0
"""A row that is expected to take longer is left out: large batches on a CPU."""

EAGER: tuple[Precision, ...] = ("fp16", "bf16", "tf32", "fp32")
COMPILED: tuple[Precision, ...] = ("fp16", "bf16")

_OUT_OF_TIME = "the budget was spent"


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A runner that may be measured."""

    tower: Tower
    name: str
    make: Callable[[], Runner]
    """Makes what the runner needs, too; hence called only when its turn comes."""


def measure(plan: Plan, output: Path | None, progress: Steps) -> Report:
    """Judge and time all runners that can be had; write the report to `output` as it grows.

    Raises:
        RunnerError: there is no such device.
        CheckpointError: a model is not to be had.
    """
    require(plan.device)
    with tempfile.TemporaryDirectory() as scratch:
        session = _Session(plan, output, progress, Path(scratch))
        session.report.limits = session.limits()
        session.save()
        subjects = [load(model, plan, progress) for model in plan.models]
        phases: tuple[Callable[[_Session, Subject], Iterator[_Candidate]], ...] = (
            partial(_modules, EagerRunner, EAGER),
            _graphs_on_gpu,
            partial(_modules, CompiledRunner, COMPILED),  # takes minutes to compile
            _torchscript,
            _on_cpu,
        )
        for phase in phases:
            for subject in subjects:
                for candidate in phase(session, subject):
                    session.measure(subject, candidate)
        try:
            session.report.limits_at_end = session.limits()
        except RuntimeError as error:  # a runner may have left the device broken
            session.leave_out("the device itself at the end", str(error))
        session.save()
    return session.report


def _modules(
    kind: type[EagerRunner],
    precisions: Iterable[Precision],
    session: "_Session",
    subject: Subject,
) -> Iterator[_Candidate]:
    for precision in precisions:
        for tower in TOWERS:
            make = partial(kind, subject.module(tower), session.plan.device, precision)
            yield _Candidate(tower, make().name, make)


def _torchscript(session: "_Session", subject: Subject) -> Iterator[_Candidate]:
    """In float32, as `export` writes it."""
    for tower in TOWERS:
        path = session.scratch / f"{tower}.pt"
        runner = TorchScriptRunner(path, session.plan.device)
        yield _Candidate(tower, runner.name, partial(_traced, subject.module(tower), runner, path))


def _traced(tower: ImageTower | TextTower, runner: TorchScriptRunner, path: Path) -> Runner:
    from export.graphs.torchscript import export_torchscript  # needs onnx

    export_torchscript(tower, path)
    return runner


def _graphs_on_gpu(session: "_Session", subject: Subject) -> Iterator[_Candidate]:
    for name in filter(on_gpu, session.here):
        for tower in TOWERS:
            yield _Candidate(tower, name, partial(session.open, subject, tower, name))


def _on_cpu(session: "_Session", subject: Subject) -> Iterator[_Candidate]:
    """For comparison, and last: a CPU takes its time."""
    if torch.device(session.plan.device).type != "cpu":
        for tower in TOWERS:
            yield _Candidate(tower, "eager:fp32", partial(EagerRunner, subject.module(tower)))
    for name in session.here:
        if not on_gpu(name):
            for tower in TOWERS:
                yield _Candidate(tower, name, partial(session.open, subject, tower, name))


def on_gpu(name: str) -> bool:
    """Whether the runner called `name` computes on a GPU."""
    runtime = name.partition(":")[0]
    return "cuda" in runtime or "tensorrt" in runtime


def _quantised(name: str) -> bool:
    return "int8" in RUNNERS[name]


class _Session:
    """A report in the making."""

    def __init__(self, plan: Plan, output: Path | None, progress: Steps, scratch: Path) -> None:
        self.plan, self.output, self.progress, self.scratch = plan, output, progress, scratch
        self.started = time.monotonic()
        self.report = Report(environment=environment(), plan=plan)
        self.here = []  # runners of exported graphs
        for name in filter(self.wants, RUNNERS):
            if reason := missing(name):
                self.leave_out(name, reason)
            else:
                self.here.append(name)
        self.here.sort(key=_quantised)  # a search for layers to leave out may outlast any budget

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.started + self.plan.budget - time.monotonic()

    def wants(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.plan.runners)

    def leave_out(self, what: str, reason: str) -> None:
        self.report.left_out.append(LeftOut(what=what, reason=reason))

    def save(self) -> None:
        self.report.seconds = time.monotonic() - self.started
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.output, self.report.to_json())

    def limits(self) -> Limits:
        self.progress("the device itself")
        plan = self.plan
        found = measure_limits(
            plan.device, plan.rounds, size=plan.matmul_size, copy_bytes=plan.copy_bytes
        )
        self.free()
        return found

    def free(self) -> None:
        """Give a GPU its memory back: not every library allocates by way of PyTorch."""
        if torch.device(self.plan.device).type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def open(self, subject: Subject, tower: Tower, name: str) -> Runner:
        def progress(step: str, done: int = 0, total: int = 0) -> None:
            if self.left <= 0:
                raise RunnerError(f"{_OUT_OF_TIME} at: {step}")
            self.progress(f"{subject.checkpoint.name}: {step}", done, total)

        alike = [other for other in self.here if _quantised(other) == _quantised(name)]
        precisions = frozenset(RUNNERS[other] for other in alike)
        bundle = subject.bundle(self.plan.bundles, precisions, progress)
        if library := library_of(name):
            most = max(batch for works in subject.works.values() for batch, _ in works)
            bundle = subject.with_plans(bundle, library, RUNNERS[name], most, progress)
        return open_runner(bundle, tower, name)

    def measure(self, subject: Subject, candidate: _Candidate) -> None:
        """Judge a runner and time it on every batch; whatever goes wrong is written down."""
        if not self.wants(candidate.name):
            return
        what = f"{subject.checkpoint.name}, {candidate.tower} tower, {candidate.name}"
        if self.left <= 0:
            self.leave_out(what, _OUT_OF_TIME)
            return
        self.progress(what)
        try:
            start = time.monotonic()
            with candidate.make() as runner:
                verdict = judge(runner, subject.expected[candidate.tower], candidate.tower)
                gate = Gate(
                    model=subject.checkpoint.name,
                    tower=candidate.tower,
                    verdict=verdict,
                    seconds=time.monotonic() - start,
                )
                self.report.gates.append(gate)
                if verdict.min_cosine <= -1:  # it could not run a probe, or not to a finite end
                    for batch, _ in subject.expected[candidate.tower].probes:
                        runner.run(batch)
                self._time(subject, candidate.tower, runner, verdict)
        except ClipDeployError as error:
            self.leave_out(what, str(error))
        except Exception as error:  # a library's own; it must not cost the others their numbers
            self.leave_out(what, f"{type(error).__name__}: {error}")
        finally:
            if candidate.name.startswith("compiled"):
                torch._dynamo.reset()  # all towers share one limit of compilations
            self.free()
            self.save()

    def _time(self, subject: Subject, tower: Tower, runner: Runner, verdict: Verdict) -> None:
        rate = 0.0  # seconds an operation, of the row before
        for batch, length in subject.works[tower]:
            work = f"{subject.checkpoint.name}, {tower} {batch}"
            work += f" x {length} tokens, {runner.name}" if length else f", {runner.name}"
            if self.left <= 0:
                self.leave_out(f"{work}, and what follows", _OUT_OF_TIME)
                return
            flops = count_flops(subject.checkpoint.clip.config, tower, batch, length)
            expected = rate * flops * (self.plan.rounds + 3)
            if expected > min(ROW_SECONDS, self.left):
                self.leave_out(work, f"expected to take {expected:.0f} s, too long")
                continue
            try:
                row = self._row(subject, tower, runner, verdict, (batch, length))
            except RunnerError as error:  # such as too little memory: other rows may fit
                self.leave_out(work, str(error))
                continue
            rate = row.milliseconds_host / 1e3 / flops
            self.report.rows.append(row)
            self.save()

    def _row(
        self, subject: Subject, tower: Tower, runner: Runner, verdict: Verdict, work: Work
    ) -> Row:
        device, rounds, (batch, length) = self.plan.device, self.plan.rounds, work
        items = subject.items[tower, length][:batch]
        start = time.perf_counter()
        runner.run(items)
        first = time.perf_counter() - start
        host = timed(lambda: runner.run(items), device, rounds)
        alone: list[float] = []
        if isinstance(runner, TorchRunner) and runner.device.type == torch.device(device).type:
            alone = timed(runner.launcher(items), device, rounds)
        flops = count_flops(subject.checkpoint.clip.config, tower, batch, length)
        tflops = flops / median(alone or host) / 1e12
        matmul = None
        if self.report.limits and on_gpu(runner.name) == (torch.device(device).type == "cuda"):
            precision = runner.name.partition(":")[2].partition("-")[0]  # int8 of int8-dynamic
            matmul = self.report.limits.matmul_tflops.get(precision)
        return Row(
            model=subject.checkpoint.name,
            tower=tower,
            batch=batch,
            length=length,
            runner=runner.name,
            runtime_version=runner.runtime_version,
            passed=verdict.passed,
            min_cosine=verdict.min_cosine,
            first_call_seconds=first,
            milliseconds_host=median(host) * 1e3,
            milliseconds_host_range=(min(host) * 1e3, max(host) * 1e3),
            milliseconds_device=median(alone) * 1e3 if alone else None,
            milliseconds_device_range=(min(alone) * 1e3, max(alone) * 1e3) if alone else None,
            gflop=flops / 1e9,
            tflops=tflops,
            matmul_tflops=matmul,
            fraction=tflops / matmul if matmul else None,
        )
