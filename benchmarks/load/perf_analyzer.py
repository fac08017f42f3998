"""NVIDIA's perf_analyzer: locates it, runs it, and parses its output.

The package of that name on PyPI is empty. The program is in the wheel of tritonclient 2.50.0. It
links against two libraries that the wheel does not contain: libb64, and the CUDA runtime (a GPU is
not required). The wheel of nvidia-pytriton contains both under other file names.

Surprising behavior, observed with 2.50.0:
- BYTES in base64 must have the wire format: four bytes of length, then the item.
- It exits at its first failed request, so it cannot measure a load with errors.
- It writes no report for an unstable load. It is therefore told to accept any load, and stability
  is computed from the windows that it prints.
- Each run starts again with the first item.
"""

import base64
import csv
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
from serving.util.typed_json import json_text

INSTALL = (
    "python -m pip install --no-deps --target .venv/perf_analyzer tritonclient==2.50.0 "
    "(`make setup` runs this)"
)
_EMBEDDED = f"{install_command('embedded')}, or"
LIBRARIES = {
    "libb64.so.0d": f"{_EMBEDDED} apt-get install libb64-0d",
    "libcudart.so.12": f"{_EMBEDDED} pip install nvidia-cuda-runtime-cu12",
}
"""Libraries that it links against and a machine may lack, with advice to install them."""
_ANY_STABILITY = "1000000"
_GRACE_S = 60.0
"""Seconds that it may take in addition to three times its windows, to load data and finish."""
_WARM_UP = 2  # requests per request in flight
_LARGER_WINDOWS = 3
"""Maximum number of times that the window is doubled if it has too few responses."""
_PASS = re.compile(r"Pass \[\d+\] throughput: (\S+) infer/sec\. Avg latency: (\d+) usec")
# The second message means that a step of the ensemble had no request within the windows.
_TOO_SMALL = re.compile("use a larger time window|failed to find the requested model version")
_MISSING = re.compile(r"error while loading shared libraries: ([^:\s]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfAnalyzer:
    """The program, the directory of its libraries, and a scratch directory."""

    binary: Path
    version: str
    libraries: Path
    scratch: Path
    name: Literal["perf_analyzer"] = "perf_analyzer"

    def measure(self, load: Load) -> Measured:
        """Measure a load; see `Client`. Raises ServerError at the first failed request."""
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
                f"perf_analyzer did not end within {limit:.0f} s at {_described(load)}",
                advice="check whether the server hangs; see its log",
            ) from error
        after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
        if not report.exists():
            raise _failure(load, done)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return parse(report.read_text(), done.stdout, cpu / seconds / cpu_count())


class _WindowError(ServerError):
    """A window had too few responses."""


@contextmanager
def open_perf_analyzer() -> Iterator[PerfAnalyzer]:
    """Return perf_analyzer, ready to run.

    Raises:
        RunnerError: it is missing or cannot be loaded; the message says what to install.
    """
    binary = find()
    with tempfile.TemporaryDirectory(prefix="clip-deploy-perf-analyzer-") as scratch:
        libraries = Path(scratch) / "lib"
        libraries.mkdir()
        for name in LIBRARIES:
            if (found := _library(name)) is not None:
                (libraries / name).symlink_to(found)
        yield PerfAnalyzer(
            binary=binary,
            version=_version(binary, libraries),
            libraries=libraries,
            scratch=Path(scratch),
        )


def find() -> Path:
    """Return the path of perf_analyzer: on PATH, or where INSTALL installs it.

    Raises:
        RunnerError: it is in neither place.
    """
    installed = Path(sys.prefix) / "perf_analyzer" / "bin" / "perf_analyzer"
    on_path = shutil.which("perf_analyzer")
    if on_path is None and not installed.is_file():
        raise RunnerError(
            f"no perf_analyzer on PATH, and none at {installed}", advice=f"install it: {INSTALL}"
        )
    return Path(on_path) if on_path is not None else installed


def _library(name: str) -> Path | None:
    """Find a library in a wheel, by its name or with a hash, as in `libb64-98cb6333.so.0d`."""
    packages = Path(sysconfig.get_path("purelib"))
    stem, _, suffix = name.partition(".")
    hashed = sorted(packages.glob(f"nvidia_pytriton.libs/{stem}-*.{suffix}*"))
    return next(iter([*packages.glob(f"nvidia/cuda_runtime/lib/{name}"), *hashed]), None)


def _environment(libraries: Path) -> dict[str, str]:
    # The user's own directories take precedence.
    paths = [os.environ.get("LD_LIBRARY_PATH", ""), str(libraries)]
    return os.environ | {"LD_LIBRARY_PATH": ":".join(filter(None, paths))}


def _version(binary: Path, libraries: Path) -> str:
    """Return the version that the program prints.

    Raises:
        RunnerError: it cannot be run.
    """
    command = [str(binary), "--version"]
    try:
        done = subprocess.run(
            command, env=_environment(libraries), capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunnerError(
            f"{binary} cannot be run: {error}", advice=f"install it: {INSTALL}"
        ) from error
    if done.returncode == 0:
        return (done.stdout or done.stderr).strip()
    if (missing := _MISSING.search(done.stderr)) is not None:
        advice = LIBRARIES.get(missing[1], "install the system package that contains it")
        raise RunnerError(f"{binary} requires the missing library {missing[1]}", advice=advice)
    raise RunnerError(
        f"{' '.join(command)} exited with {done.returncode}: {done.stderr.strip()[-300:]}",
        advice=f"install a version that is known to work: {INSTALL}",
    )


def input_data(workload: Workload) -> str:
    """Return the JSON for `--input-data`: one item per request, BYTES as base64."""
    # perf_analyzer adds the batch dimension of models that have a maximum batch size.
    shape = [1] if workload.model == "clip_image" else [1, 1]
    rows = [
        {workload.tensor: {"content": {"b64": _wire_bytes(item)}, "shape": shape}}
        for item in workload.items
    ]
    return json_text({"data": rows})


def _wire_bytes(item: bytes) -> str:
    return base64.b64encode(len(item).to_bytes(4, "little") + item).decode()


def arguments(load: Load, data: Path, report: Path) -> list[str]:
    """Return the command-line options; see docs/cli.md of perf_analyzer."""
    value = f"{load.load:g}"
    if load.mode == "concurrency":
        # Without warm-up the first window starts with idle queues: 9 instead of 17 images/s.
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
    """Parse the CSV report of a load, and the windows in the output.

    Raises:
        ServerError: the report does not have the format of a known version.
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
            f"latency and one row, got {report[:300]!r}",
            advice=f"install a supported version: {INSTALL}",
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
        f"perf_analyzer exited with {done.returncode} and no report at {_described(load)}: "
        f"{' '.join(lines)[-600:] or said[-600:]}"
    )


def _described(load: Load) -> str:
    unit = "requests in flight" if load.mode == "concurrency" else "requests/s"
    return f"{load.load:g} {unit} of {load.workload.model} over {load.wire}"
