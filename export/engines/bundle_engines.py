"""Engines of a bundle: building them on this machine, the parity gate, and the manifest entry.

This needs neither torch nor the checkpoint, so that it runs in the container that will serve the
engines. The parity gate compares engines with the bundle's float32 graph, which the export has
compared with eager float32.

`export.engines.builder` builds a single engine.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from export.engines.builder import EngineOptions, build_plan
from export.gate.datasets import probes
from export.gate.parity import Expected, expect, judged_plan
from serving.bundles.bundle import Bundle, describe_file
from serving.bundles.engine_facts import Engine
from serving.bundles.manifest import TOWERS, Artifact, Tower
from serving.runners.registry import open_runner
from serving.runners.tensor_rt import library_version
from serving.util.files import write_bytes, write_text
from serving.util.nvidia import gpu
from serving.util.progress import Progress
from serving.util.typed_json import json_text


def add_engines(
    bundle: Bundle, precisions: Sequence[str], options: EngineOptions, progress: Progress
) -> Bundle:
    """Build an engine of both towers in each of `precisions`, and add it with its verdict.

    The manifest is written after each engine, so that engines finished before an error or a kill
    are kept. A new engine replaces one for the same graph, precision, device, library and version.

    Args:
        bundle: the bundle to extend.
        precisions: precisions of the graphs to build from: `fp32` (which runs in TF32), `fp16`,
            `int8`, `int8-fp16`.
        options: settings of the builder.
        progress: called with each step.

    Returns:
        The extended bundle.

    Raises:
        BundleError: the bundle has no such graph, or the file differs from the exported one.
        RunnerError: the library cannot be loaded.
        ExportError: the library cannot parse or build a graph.
    """
    wanted = [(tower, bundle.artifact(tower, name)) for tower in TOWERS for name in precisions]
    expected = _expected(bundle, progress)
    options = replace(options, timing_cache=options.timing_cache or _timing_cache(options))
    for tower, graph in wanted:
        progress(f"{graph.file}: building for {options.library}")
        path = bundle.verified(graph)
        plan, engine = build_plan(
            path, graph.files[0].sha256, tower, bundle.manifest, options, progress
        )
        artifact = _write(bundle, tower, graph.precision, plan, engine)
        artifact = judged_plan(bundle, artifact, expected[tower], progress)
        bundle = _record(bundle, artifact)
    return bundle


def buildable(bundle: Bundle) -> list[str]:
    """Return the default precisions for engines: fp16 and INT8, or else fp32.

    INT8 is `int8-fp16` if the bundle has it, since `int8` would run attention in TF32.
    """
    has = {a.precision for a in bundle.manifest.artifacts if a.kind == "onnx"}
    chosen = ["fp16", "int8-fp16" if "int8-fp16" in has else "int8"]
    return [precision for precision in chosen if precision in has] or ["fp32"]


def _expected(bundle: Bundle, progress: Progress) -> dict[Tower, Expected]:
    """Run the float32 graphs on the probes. Without a GPU no engine can run, so it is skipped."""
    if gpu() is None:
        return {tower: Expected(probes=[], labelled=None) for tower in TOWERS}
    progress("reference embeddings by the float32 graphs")
    found: dict[Tower, Expected] = {}
    for tower in TOWERS:
        batches = probes(tower, bundle.manifest.image, bundle.manifest.text)
        with open_runner(bundle, tower, "onnxruntime:fp32") as runner:
            found[tower] = expect(runner, batches, None)
    every = {tower: np.concatenate([e for _, e in found[tower].probes]) for tower in TOWERS}
    return {
        "image": replace(found["image"], candidates=every["text"]),
        "text": replace(found["text"], candidates=every["image"]),
    }


def _write(bundle: Bundle, tower: Tower, precision: str, plan: bytes, engine: Engine) -> Artifact:
    """Write the .plan file and its sidecar, and return the artifact.

    If the manifest already lists a file of that name, the new one gets another name, so that the
    old engine stays valid until the manifest lists the new one.
    """
    root, known = bundle.path, {a.file for a in bundle.manifest.artifacts}
    device = re.sub(r"[^a-z0-9]+", "-", (engine.device or "any").lower()).strip("-")
    directory = root / "engines" / f"{device}-{engine.library}-{engine.version}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{tower}.{precision}.plan"
    if path.relative_to(root).as_posix() in known:
        path = path.with_suffix(".new.plan")
    write_bytes(path, plan)
    file = describe_file(path, root)
    facts = {"tower": tower, "precision": precision, "sha256": file.sha256, **asdict(engine)}
    sidecar = path.with_name(path.name + ".json")
    write_text(sidecar, json_text(facts, indent=2) + "\n")
    return Artifact(
        graph=tower,
        kind="engine",
        precision=precision,
        files=(file, describe_file(sidecar, root)),
        engine=engine,
    )


def _record(bundle: Bundle, artifact: Artifact) -> Bundle:
    """Write the manifest with a new engine, and remove the engine that it replaces."""
    old = [a for a in bundle.manifest.artifacts if _identity(a) == _identity(artifact)]
    kept = (a for a in bundle.manifest.artifacts if a not in old)
    bundle = Bundle(bundle.path, replace(bundle.manifest, artifacts=(*kept, artifact)))
    write_text(bundle.path / "manifest.json", bundle.manifest.to_json())
    directory = (bundle.path / artifact.file).parent
    for path in (bundle.path / file.name for a in old for file in a.files):
        if path.parent == directory:  # a forged manifest could list files outside the bundle
            path.unlink(missing_ok=True)
    return bundle


def _identity(artifact: Artifact) -> tuple[object, ...]:
    """Return the fields that no two engines of a bundle share."""
    engine = artifact.engine
    facts = (engine.library, engine.version, engine.device) if engine else (artifact.file,)
    return artifact.graph, artifact.precision, *facts


def _timing_cache(options: EngineOptions) -> Path | None:
    """Return the default timing cache of this device; None if a build does not time kernels."""
    device, version = gpu(), library_version(options.library)
    if device is None or options.library != "tensorrt":
        return None
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{options.library}-{version}-{device.name}")
    return Path.home() / ".cache" / "clip-deploy" / f"{name}.timing"
