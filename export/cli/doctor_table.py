"""The report of `doctor` as tables."""

import re
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from export.doctor.installed import Software
from export.doctor.report import DoctorReport, Row
from serving.cli.console import add, table
from serving.runners.spec import RunnerSpec


def tables(report: DoctorReport) -> list[Table]:
    """Return the machine, what can be done with it, and what can run towers."""
    same: dict[Row, list[str]] = {}
    for one in report.runners:
        spec = RunnerSpec.parse(one.name)
        same.setdefault((spec.runtime, one.why, one.mend), []).append(spec.precision)
    runners = [(f"{row[0]}: {', '.join(names)}", *row[1:]) for row, names in same.items()]
    abilities = [(one.name, one.why, one.mend) for one in report.abilities]
    done = _possible("What can be done here", abilities)
    return [_here(report), done, _possible("What can run towers here", runners)]


def _possible(title: str, rows: Iterable[Row]) -> Table:
    made = table(title, ("", "possible", "why not", "what to do"))
    for name, why, mend in rows:
        answer = Text("no", "red") if why else Text("yes", "green")
        add(made, (name, answer, "\n".join(why), "\n".join(mend)))
    return made


def _here(report: DoctorReport) -> Table:
    machine, device = report.machine, report.machine.gpu
    card, driver = "none", machine.nvidia_driver or "not found"
    if device:
        size, driver = device.memory_bytes / 2**30, f"{driver}, for CUDA up to {device.cuda}"
        card = f"{device.name}, {size:.0f} GiB, compute capability {device.compute_capability}"
    gain = "int8 faster than fp32"
    if machine.int8 == "none":  # measured: docs/decisions/0043-exact-int8-without-vnni.md
        gain = "without: int8 little faster than fp32, openvino:int8 less exact"
    hardware = (
        ("Python", machine.python, ""),
        ("CPU", f"{machine.cpu}, {machine.cpus} usable", ""),
        ("CPU int8", machine.int8, gain),
        ("CPU bfloat16", "yes" if machine.bf16 else "no", "openvino:bf16"),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB usable", ""),
        ("NVIDIA GPU", card, ""),
        ("NVIDIA driver", driver, ""),
    )
    made = table("This machine", ("", "here", "for"), hardware)
    made.add_section()
    for one in report.software:
        add(made, (one.name, _state(one), one.purpose))
    return made


def _state(one: Software) -> Text:
    if one.state == "missing":
        return Text.assemble(("not installed", "yellow"), f": {one.mend or ''}")
    if one.state == "broken":
        version = f"{one.version} " if one.version else ""
        return Text.assemble(version, ("broken", "red"), f": {one.error or ''}")
    facts, words = one.facts, list[str]()
    if one.name == "torch":
        built = f"for CUDA {facts['cuda']}, {'finds a GPU' if facts['gpu'] else 'finds no GPU'}"
        words += [built if facts["cuda"] else "for CPUs only"]
    words += [name.removesuffix("ExecutionProvider") for name in facts.get("providers", ())]
    words += [name for name in facts.get("cpu", ()) if re.fullmatch(r"[A-Z]+\d+", name)]
    words += [f"{name}: {facts[name]}" for name in ("path", "libpython") if name in facts]
    if {"onnxruntime", "onnxruntime-gpu"} <= set(facts.get("distributions", ())):
        words += ["onnxruntime and onnxruntime-gpu overwrite each other: keep one"]
    return Text((one.version or "works") + (f" ({', '.join(words)})" if words else ""))
