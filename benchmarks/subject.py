"""A model that `gpu.py` measures: its towers, batches to run, what they must give, its graphs."""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_report import Plan, Work
from export.checkpoints.load import Checkpoint, load_checkpoint
from export.gate.datasets import probe_images, probe_texts
from export.gate.parity import Expected, expect
from export.gate.torch_runners import EagerRunner
from export.kinds import Kind
from export.towers.clip import ImageTower, TextTower
from serving.bundles.bundle import Bundle
from serving.bundles.engine_facts import Library
from serving.bundles.manifest import TOWERS, Tower
from serving.errors import RunnerError
from serving.runners.base import Batch
from serving.util.progress import Steps

_PROBES = 8


@dataclass(kw_only=True)
class Subject:
    """A loaded model."""

    checkpoint: Checkpoint
    works: dict[Tower, list[Work]]
    items: dict[tuple[Tower, int | None], Batch]
    """The largest batch of each length; a smaller one is its beginning."""
    expected: dict[Tower, Expected]
    _bundles: dict[frozenset[str], Bundle | str] = field(default_factory=dict)
    """By the precisions asked for; or why there is none."""
    _plans: dict[tuple[Path, Library, str], Bundle] = field(default_factory=dict)

    def module(self, tower: Tower) -> ImageTower | TextTower:
        """One tower."""
        clip = self.checkpoint.clip
        return clip.image if tower == "image" else clip.text

    def bundle(self, folder: Path, precisions: frozenset[str], progress: Steps) -> Bundle:
        """Graphs of these precisions in a folder below `folder`, exported when first asked for.

        Raises:
            RunnerError: they cannot be made here; a library is missing, say.
        """
        if precisions not in self._bundles:
            self._bundles[precisions] = self._export(folder, precisions, progress)
        made = self._bundles[precisions]
        if isinstance(made, str):
            raise RunnerError(made)
        return made

    def with_plans(
        self, bundle: Bundle, library: Library, precision: str, max_batch: int, progress: Steps
    ) -> Bundle:
        """`bundle` with plans of both towers in `precision`, built when first asked for.

        Raises:
            ClipDeployError: the library is not to be had, or cannot build them.
        """
        key = (bundle.path, library, precision)
        if key not in self._plans:
            from export.engines.builder import EngineOptions
            from export.engines.bundle_engines import add_engines

            options = EngineOptions(library=library, max_batch=max_batch)
            self._plans[key] = add_engines(bundle, [precision], options, progress)
        return self._plans[key]

    def _export(self, folder: Path, precisions: frozenset[str], progress: Steps) -> Bundle | str:
        path = folder / "-".join([self.checkpoint.name, *sorted(precisions)])
        kinds = [kind for kind in Kind if kind.value in precisions]
        try:
            from export.pipeline import Options, build  # needs onnx, onnxruntime and onnxscript

            return build(self.checkpoint, path, progress, Options(kinds=kinds))
        except Exception as error:  # exporters and quantizers have classes of their own
            which = ", ".join(sorted(precisions))
            return f"no graphs in {which}: {type(error).__name__}: {error}"


def load(model: str, plan: Plan, progress: Steps) -> Subject:
    """Load `model`, draw its batches, and embed probes with eager float32 on the CPU.

    Raises:
        CheckpointError: see `export.checkpoints.load.load_checkpoint`.
    """
    progress(f"loading {model}")
    checkpoint = load_checkpoint(model)
    image, text = checkpoint.image, checkpoint.text
    works = {tower: plan.works(tower, text.context_length) for tower in TOWERS}
    largest = {tower: max(batch for batch, _ in works[tower]) for tower in TOWERS}
    items: dict[tuple[Tower, int | None], Batch] = {
        ("image", None): probe_images(image, largest["image"], seed=1)
    }
    probes: dict[Tower, list[Batch]] = {"image": [probe_images(image, _PROBES)], "text": []}
    for length in {length for _, length in works["text"] if length}:
        items["text", length] = probe_texts(text, largest["text"], length, seed=1)
        probes["text"].append(probe_texts(text, _PROBES, length))
    subject = Subject(checkpoint=checkpoint, works=works, items=items, expected={})
    progress(f"reference embeddings of {model} by eager fp32 on the CPU")
    for tower in TOWERS:
        with EagerRunner(subject.module(tower)) as eager:
            subject.expected[tower] = expect(eager, probes[tower], None)
    return subject
