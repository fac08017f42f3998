"""NVIDIA's perf_analyzer: finding it, running it, reading what it says.

The package of that name on PyPI is empty. The program lies in the wheel of tritonclient 2.50.0,
and links against two libraries that the wheel leaves out: libb64, and the CUDA runtime, of which it
needs no GPU. Both are in the wheel of nvidia-pytriton under names of their own; or install them.

What it does that one would not guess (seen with 2.50.0):
- BYTES in base64 are taken as they go over the wire: four bytes of length, then the item.
- It ends with its first failed request, so its numbers are of loads without errors.
- A load that is not stable has no report. So it is told to accept any; whether it was stable is
  read from the windows that it prints.
- Each run begins with the first item again.
"""

import base64
import csv
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.load.workload import WINDOWS, Load, Measured, Workload, steady
from serving.clients.endpoint import admin_headers
from serving.errors import RunnerError, ServerError
from serving.util.extras import install_command
from serving.util.machine import cpu_count

INSTALL = (
    "python -m pip install --no-deps --target .venv/perf_analyzer tritonclient==2.50.0 "
    "(`make setup` does)"
)
_EMBEDDED = f"{install_command('embedded')} brings it, or"
LIBRARIES = {
    "libb64.so.0d": f"{_EMBEDDED} apt-get install libb64-0d",
    "libcudart.so.12": f"{_EMBEDDED} pip install nvidia-cuda-runtime-cu12",
}
"""What it links against and a machine may lack, and what installs it."""
_ANY_STABILITY = "1000000"
_GRACE_S = 60.0
"""Seconds that it may take beyond three times its windows: to read data, to end requests."""
_WARM_UP = 2  # requests for each that is under way
_LARGER_WINDOWS = 3
"""Times the window is doubled, where the server answers nothing in it."""
_PASS = re.compile(r"Pass \[\d+\] throughput: (\S+) infer/sec\. Avg latency: (\d+) usec")
# The second where a step of the ensemble has not one request within the windows.
_TOO_SMALL = re.compile("use a larger time window|failed to find the requested model version")
_MISSING = re.compile(r"error while loading shared libraries: ([^:\s]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfAnalyzer:
    """The program, and folders of the libraries that it needs."""

    binary: Path
    version: str
    libraries: Path
    scratch: Path
    name: Literal["perf_analyzer"] = "perf_analyzer"

    def measure(self, load: Load) -> Measured:
        """See `benchmarks.load.workload.Client`; the first failed request is a ServerError."""
        for _ in range(_LARGER_WINDOWS):
            try:
                return self._measure(load)
            except _WindowError:
                load = replace(load, window_s=2 * load.window_s)
        return self._measure(load)

    def _measure(self, load: Load) -> Measured:
        data, report = self.scratch / "data.json", self.scratch / "report.csv"
        data.write_text(input_data(load.workload))
        report.unlink(missing_ok=True)
        limit = 3 * WINDOWS * load.window_s + _GRACE_S
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        try:
            done = subprocess.run(
                [str(self.binary), *arguments(load, data, report)],
                env=_environment(self.libraries),
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(
                f"perf_analyzer did not end within {limit:.0f} s at {_told(load)}; is the server "
                "stuck? Its log may tell"
            ) from error
        after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
        if not report.exists():
            raise _failure(load, done)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return parse(report.read_text(), done.stdout, cpu / seconds / cpu_count())


class _WindowError(ServerError):
    """Too few answers came within a window."""


@contextmanager
def open_perf_analyzer() -> Iterator[PerfAnalyzer]:
    """The program of this machine, ready to run.

    Raises:
        RunnerError: there is none, or it does not load; with what to install.
    """
    binary = find()
    with tempfile.TemporaryDirectory(prefix="clip-deploy-perf-analyzer-") as folder:
        libraries = Path(folder) / "lib"
        libraries.mkdir()
        for name in LIBRARIES:
            if (found := _library(name)) is not None:
                (libraries / name).symlink_to(found)
        yield PerfAnalyzer(
            binary=binary,
            version=_version(binary, libraries),
            libraries=libraries,
            scratch=Path(folder),
        )


def find() -> Path:
    """perf_analyzer on PATH, or where INSTALL puts it in this environment.

    Raises:
        RunnerError: it is in neither place.
    """
    installed = Path(sys.prefix) / "perf_analyzer" / "bin" / "perf_analyzer"
    on_path = shutil.which("perf_analyzer")
    if on_path is None and not installed.is_file():
        raise RunnerError(
            f"no perf_analyzer on PATH, and none at {installed}; {INSTALL} installs it"
        )
    return Path(on_path) if on_path is not None else installed


def _library(name: str) -> Path | None:
    """A library within a wheel; under its own name, or one with a hash: `libb64-98cb6333.so.0d`."""
    packages = Path(sysconfig.get_path("purelib"))
    stem, _, suffix = name.partition(".")
    hashed = sorted(packages.glob(f"nvidia_pytriton.libs/{stem}-*.{suffix}*"))
    return next(iter([*packages.glob(f"nvidia/cuda_runtime/lib/{name}"), *hashed]), None)


def _environment(libraries: Path) -> dict[str, str]:
    # Ours last: a user's own go first.
    paths = [os.environ.get("LD_LIBRARY_PATH", ""), str(libraries)]
    return os.environ | {"LD_LIBRARY_PATH": ":".join(filter(None, paths))}


def _version(binary: Path, libraries: Path) -> str:
    """What it says of itself; RunnerError where it cannot run."""
    command = [str(binary), "--version"]
    try:
        done = subprocess.run(
            command, env=_environment(libraries), capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunnerError(f"{binary} cannot be run: {error}; {INSTALL} installs one") from error
    if done.returncode == 0:
        return (done.stdout or done.stderr).strip()
    if (missing := _MISSING.search(done.stderr)) is not None:
        hint = LIBRARIES.get(missing[1], "install the package of your system that has it")
        raise RunnerError(f"{binary} does not load, the library {missing[1]} is missing: {hint}")
    raise RunnerError(
        f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-300:]}; "
        f"{INSTALL} installs one that is known to run"
    )


def input_data(workload: Workload) -> str:
    """The JSON of `--input-data`: one item a request, BYTES as base64."""
    rows = [
        {workload.tensor: {"content": {"b64": _wire_bytes(item)}, "shape": [1]}}
        for item in workload.items
    ]
    return json.dumps({"data": rows})


def _wire_bytes(item: bytes) -> str:
    return base64.b64encode(len(item).to_bytes(4, "little") + item).decode()


def arguments(load: Load, data: Path, report: Path) -> list[str]:
    """Its options; see its docs/cli.md."""
    value = f"{load.load:g}"
    if load.mode == "concurrency":
        # Or its first window begins with nothing under way: 9 pictures/s of 17.
        warm_up = str(math.ceil(_WARM_UP * load.load))
        mode = ["--concurrency-range", f"{value}:{value}:1", "--warmup-request-count", warm_up]
    else:
        mode = ["--request-rate-range", f"{value}:{value}:1", "--request-distribution", "poisson"]
    headers = admin_headers(load.wire, load.admin_key)
    return [
        *("-v", "--async", "-m", load.workload.model, "-i", load.wire, "-u", load.address),
        *("--input-data", str(data), *mode, "-f", str(report), "--verbose-csv"),
        *("--measurement-interval", f"{load.window_s * 1e3:.0f}", "--max-trials", str(WINDOWS)),
        *("--stability-percentage", _ANY_STABILITY),
        *(part for name, value in headers.items() for part in ("-H", f"{name}:{value}")),
    ]


def parse(report: str, output: str, cpu_share: float) -> Measured:
    """Read the CSV report of one load, and the windows in what was printed.

    Raises:
        ServerError: these are not of a perf_analyzer that we know.
    """
    rows = list(csv.DictReader(report.splitlines()))
    windows = [(float(rate), float(latency)) for rate, latency in _PASS.findall(output)][-WINDOWS:]
    try:
        (row,) = rows
        latencies = {p: float(row[f"p{p} latency"]) / 1e3 for p in (50, 95, 99)}
        throughput = float(row["Inferences/Second"])
    except (KeyError, ValueError) as error:
        raise ServerError(
            "expected perf_analyzer's report with columns Inferences/Second, p50, p95 and p99 "
            f"latency and one row, got {report[:300]!r}; {INSTALL} installs a version that is known"
        ) from error
    return Measured(
        throughput_per_s=throughput,
        p50_ms=latencies[50],
        p95_ms=latencies[95],
        p99_ms=latencies[99],
        errors=0,
        stable=len(windows) == WINDOWS and steady(*zip(*windows, strict=True)),
        cpu_share=cpu_share,
    )


def _failure(load: Load, done: subprocess.CompletedProcess[str]) -> ServerError:
    said = f"{done.stderr.strip()}\n{done.stdout.strip()}"
    kind = _WindowError if _TOO_SMALL.search(said) else ServerError
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return kind(
        f"perf_analyzer ended with {done.returncode} and no report at {_told(load)}: "
        f"{' '.join(lines)[-600:] or said[-600:]}"
    )


def _told(load: Load) -> str:
    unit = "requests under way" if load.mode == "concurrency" else "requests/s"
    return f"{load.load:g} {unit} of {load.workload.model} over {load.wire}"
