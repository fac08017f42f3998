"""The report of `doctor` as tables."""

import re
from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from export.doctor.installed import Software
from export.doctor.report import Report, Row


def tables(report: Report) -> list[Table]:
    """What people read of a report."""
    same: dict[Row, list[str]] = {}
    for one in report.runners:
        runtime, _, precision = one.name.partition(":")
        same.setdefault((runtime, one.why, one.mend), []).append(precision)
    runners = [(f"{row[0]}: {', '.join(names)}", *row[1:]) for row, names in same.items()]
    abilities = [(one.name, one.why, one.mend) for one in report.abilities]
    done = _possible("What can be done here", abilities)
    return [_here(report), done, _possible("What can run towers here", runners)]


def _possible(title: str, rows: Iterable[Row]) -> Table:
    table = Table(title=title)
    for name in ("", "", "why not", "what to do"):
        table.add_column(name, overflow="fold")
    for name, why, mend in rows:
        answer = "[red]no[/]" if why else "[green]yes[/]"
        table.add_row(name, answer, *(escape("\n".join(lines)) for lines in (why, mend)))
    return table


def _here(report: Report) -> Table:
    machine, device = report.machine, report.machine.gpu
    card, driver = "none", machine.nvidia_driver or "not found"
    if device:
        size, driver = device.memory_bytes / 2**30, f"{driver}, for CUDA up to {device.cuda}"
        card = f"{device.name}, {size:.0f} GiB, compute capability {device.compute_capability}"
    table = Table(title="This machine")
    for name in ("", "here", "for"):
        table.add_column(name, overflow="fold")
    table.add_row("Python", machine.python)
    table.add_row("CPU", f"{machine.cpu}, {machine.cpus} usable")
    gain = "int8 faster than fp32"
    if machine.int8 == "none":  # measured: docs/decisions.md, 2026-11-21
        gain = "without: int8 little faster than fp32, openvino:int8 less exact"
    table.add_row("CPU int8", machine.int8, gain)
    table.add_row("CPU bfloat16", "yes" if machine.bf16 else "no", "openvino:bf16")
    table.add_row("memory", f"{machine.memory_bytes / 2**30:.1f} GiB usable")
    table.add_row("NVIDIA GPU", card)
    table.add_row("NVIDIA driver", driver)
    table.add_section()
    for one in report.software:
        table.add_row(one.name, _state(one), one.purpose)
    return table


def _state(one: Software) -> str:
    if one.state == "missing":
        return f"[yellow]not installed[/]: {escape(one.mend or '')}"
    if one.state == "broken":
        return f"{one.version or ''} [red]broken[/]: {escape(one.error or '')}".strip()
    facts, words = one.facts, list[str]()
    if one.name == "torch":
        built = f"for CUDA {facts['cuda']}, {'finds a GPU' if facts['gpu'] else 'finds no GPU'}"
        words += [built if facts["cuda"] else "for CPUs only"]
    words += [name.removesuffix("ExecutionProvider") for name in facts.get("providers", ())]
    words += [name for name in facts.get("cpu", ()) if re.fullmatch(r"[A-Z]+\d+", name)]
    words += [f"{name}: {escape(facts[name])}" for name in ("path", "libpython") if name in facts]
    if {"onnxruntime", "onnxruntime-gpu"} <= set(facts.get("distributions", ())):
        words += ["[red]onnxruntime and onnxruntime-gpu overwrite each other: keep one[/]"]
    return (one.version or "works") + (f" ({', '.join(words)})" if words else "")
