"""Tables of the `doctor` report."""

import re
from collections.abc import Iterable

from export.doctor.installed import Software
from export.doctor.report import DoctorReport, Row
from serving.cli.console import Cell, Table, add, styled, table
from serving.runners.spec import RunnerSpec


def tables(report: DoctorReport) -> list[Table]:
    """Return the tables of the machine, of the tasks it can do, and of the runners it can run."""
    precisions: dict[Row, list[str]] = {}
    for runner in report.runners:
        spec = RunnerSpec.parse(runner.name)
        row = (spec.runtime, runner.why, runner.mend)
        precisions.setdefault(row, []).append(spec.precision)
    runners = [(f"{row[0]}: {', '.join(names)}", *row[1:]) for row, names in precisions.items()]
    abilities = [(ability.name, ability.why, ability.mend) for ability in report.abilities]
    return [
        _machine(report),
        _possible("Tasks on this machine", abilities),
        _possible("Runners on this machine", runners),
    ]


def _possible(title: str, rows: Iterable[Row]) -> Table:
    listing = table(title, ("", "possible", "reason", "what to do"))
    for name, why, mend in rows:
        answer = styled(("no", "red") if why else ("yes", "green"))
        add(listing, (name, answer, "\n".join(why), "\n".join(mend)))
    return listing


def _machine(report: DoctorReport) -> Table:
    machine, device = report.machine, report.machine.gpu
    card, driver = "none", machine.nvidia_driver or "not found"
    if device:
        size, driver = device.memory_bytes / 2**30, f"{driver}, supports CUDA up to {device.cuda}"
        card = f"{device.name}, {size:.0f} GiB, compute capability {device.compute_capability}"
    gain = "int8 is faster than fp32"
    if machine.int8 == "none":  # measured: docs/decisions/0043-exact-int8-without-vnni.md
        gain = "int8 is hardly faster than fp32, openvino:int8 is less exact"
    hardware = (
        ("Python", machine.python, ""),
        ("CPU", f"{machine.cpu}, {machine.cpus} usable cores", ""),
        ("CPU int8", machine.int8, gain),
        ("CPU bfloat16", "yes" if machine.bf16 else "no", "openvino:bf16"),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB usable", ""),
        ("NVIDIA GPU", card, ""),
        ("NVIDIA driver", driver, ""),
    )
    listing = table("This machine", ("", "found", "used for"), hardware)
    listing.add_section()
    for software in report.software:
        add(listing, (software.name, _state(software), software.purpose))
    return listing


def _state(software: Software) -> Cell:
    if software.state == "missing":
        return styled(("not installed", "yellow"), f": {software.mend or ''}")
    if software.state == "broken":
        version = f"{software.version} " if software.version else ""
        return styled(version, ("broken", "red"), f": {software.error or ''}")
    facts, details = software.facts, list[str]()
    if software.name == "torch":
        built = f"for CUDA {facts['cuda']}, {'finds a GPU' if facts['gpu'] else 'finds no GPU'}"
        details += [built if facts["cuda"] else "for CPUs only"]
    details += [name.removesuffix("ExecutionProvider") for name in facts.get("providers", ())]
    details += [name for name in facts.get("cpu", ()) if re.fullmatch(r"[A-Z]+\d+", name)]
    details += [f"{name}: {facts[name]}" for name in ("path", "libpython") if name in facts]
    if {"onnxruntime", "onnxruntime-gpu"} <= set(facts.get("distributions", ())):
        details += ["onnxruntime and onnxruntime-gpu overwrite each other: keep one"]
    return (software.version or "works") + (f" ({', '.join(details)})" if details else "")
