"""Plans of a bundle: built for this machine, judged on it, and put into the manifest.

Needs neither torch nor the checkpoint, so that it runs in the container that will serve the plans:
they are judged against the bundle's float32 graph, which was itself judged against eager float32.

Does not know: how one plan is built (`to_engine.py`).
"""

import json
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


def add_engines(
    bundle: Bundle, precisions: Sequence[str], options: EngineOptions, progress: Progress
) -> Bundle:
    """Build, judge and record a plan of both towers in each of `precisions`.

    The manifest is written after each plan: what was finished before an error or a kill stays. A
    plan of the same device, library and version gives way to the new one.

    Args:
        precisions: of the bundle's graphs: `fp32` (runs in TF32), `fp16`, `int8`, `int8-fp16`.

    Raises:
        BundleError: the bundle has no such graph, or it is not the exported one.
        RunnerError: the library cannot be loaded.
        ExportError: it cannot parse or build a graph.
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
        bundle = _recorded(bundle, artifact)
    return bundle


def buildable(bundle: Bundle) -> list[str]:
    """What plans are built of unless asked for: fp16, and INT8 with what is best beside it on GPUs.

    With an fp16 remainder where the bundle has that: a float32 one would run attention in TF32.
    """
    has = {a.precision for a in bundle.manifest.artifacts if a.kind == "onnx"}
    chosen = ["fp16", "int8-fp16" if "int8-fp16" in has else "int8"]
    return [precision for precision in chosen if precision in has] or ["fp32"]


def _expected(bundle: Bundle, progress: Progress) -> dict[Tower, Expected]:
    """What the float32 graphs make of the probes; nothing where no plan can be run anyway."""
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
    """The plan and its sidecar on disk, described.

    Their name is one that the manifest does not vouch for yet: a plan that gives way is whole until
    the manifest has the new one.
    """
    root, known = bundle.path, {a.file for a in bundle.manifest.artifacts}
    device = re.sub(r"[^a-z0-9]+", "-", (engine.device or "any").lower()).strip("-")
    folder = root / "engines" / f"{device}-{engine.library}-{engine.version}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tower}.{precision}.plan"
    if path.relative_to(root).as_posix() in known:
        path = path.with_suffix(".new.plan")
    write_bytes(path, plan)
    file = describe_file(path, root)
    facts = {"tower": tower, "precision": precision, "sha256": file.sha256, **asdict(engine)}
    sidecar = path.with_name(path.name + ".json")
    write_text(sidecar, json.dumps(facts, indent=2) + "\n")
    return Artifact(
        graph=tower,
        kind="engine",
        precision=precision,
        files=(file, describe_file(sidecar, root)),
        engine=engine,
    )


def _recorded(bundle: Bundle, artifact: Artifact) -> Bundle:
    """`bundle` with a new plan in its manifest, and without the one that gives way to it."""
    old = [a for a in bundle.manifest.artifacts if _made_for(a) == _made_for(artifact)]
    kept = (a for a in bundle.manifest.artifacts if a not in old)
    bundle = Bundle(bundle.path, replace(bundle.manifest, artifacts=(*kept, artifact)))
    write_text(bundle.path / "manifest.json", bundle.manifest.to_json())
    folder = (bundle.path / artifact.file).parent
    for path in (bundle.path / file.name for a in old for file in a.files):
        if path.parent == folder:  # whatever else a manifest may say
            path.unlink(missing_ok=True)
    return bundle


def _made_for(artifact: Artifact) -> tuple[object, ...]:
    """What of a bundle's plans can only one have."""
    engine = artifact.engine
    facts = (engine.library, engine.version, engine.device) if engine else (artifact.file,)
    return artifact.graph, artifact.precision, *facts


def _timing_cache(options: EngineOptions) -> Path | None:
    """Where kernel times of this device are kept between builds; None where nothing is timed."""
    device, version = gpu(), library_version(options.library)
    if device is None or options.library != "tensorrt":
        return None
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{options.library}-{version}-{device.name}")
    return Path.home() / ".cache" / "clip-deploy" / f"{name}.timing"
