"""What export writes and serving reads: the bundle's layout, its manifest, its tolerances.

A bundle is a directory: `manifest.json`, `tokenizer.json`, and for each tower and precision
`<tower>.<precision>.onnx` (with `.onnx.data` beside it when over 2 GB), where it was asked for
`text.<precision>.tree.onnx`, the text tower over trees of tokens, and for TensorRT
`engines/<device>-<library>-<version>/<tower>.<precision>.plan` with its sidecar. The manifest is
the single source of truth about all of them, their names included (a plan that was built again is
called `.new.plan`); a file it does not vouch for is not loaded.

Does not know: how artifacts are made (`export`), or run (`serving.runners`).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from serving.bundles.engine_facts import Engine, Library
from serving.bundles.integrity import (
    check_external_data,
    check_names,
    check_seal,
    checked_file,
    sealed,
    unsealed,
)
from serving.errors import BundleError
from serving.util.files import sha256_of
from serving.util.typed_json import from_json

FORMAT = 2
"""Of `manifest.json`; a reader refuses any other."""

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, Tower] = ("image", "text")

Graph = Literal["onnx", "tree"]
"""Of a tower as it is, or of the text tower over trees, see `serving.inputs.prefix_tree`."""

DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""What labels are put into when a checkpoint does not say (Radford et al. 2021, 3.1.4)."""

TEXT_BUCKETS = (8, 16, 24, 32, 48)
"""Lengths a batch of texts is padded to, below the context length itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """How a picture becomes pixels, and what the image tower then does with them."""

    size: int
    """Side of the square the tower takes, in pixels."""
    resize: int
    """Length the shorter edge is resized to before the centre is cropped, in pixels."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    mean: tuple[float, float, float]
    """Per channel, of pixels scaled to 0..1; applied inside the image graph."""
    std: tuple[float, float, float]
    pipeline: Literal["openai", "huggingface"]
    """Whose conventions hold: `openai` (also OpenCLIP) resizes, then converts to RGB, and rounds
    the crop's offset half to even; `huggingface` converts first and rounds the offset down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """How a text becomes token ids."""

    context_length: int
    vocab_size: int
    start_id: int
    end_id: int
    """The end-of-text token: the text tower pools at its first occurrence."""
    pad_id: int
    """Follows the end-of-text token; causal attention makes its value irrelevant to the result."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths a batch is padded to, ascending; the last is the context length."""
        return (*(b for b in TEXT_BUCKETS if b < self.context_length), self.context_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a runner's embeddings may be from eager float32's."""

    min_cosine: float
    """Of the worst pair, not of the mean."""
    relative_accuracy: float
    """Zero-shot top-1 as a share of eager float32's, where there is labelled data."""
    max_abs_difference: float = 2.0


TOLERANCES = {
    "fp32": Tolerance(min_cosine=0.99999, relative_accuracy=0.999, max_abs_difference=1e-4),
    "tf32": Tolerance(min_cosine=0.9995, relative_accuracy=0.999),
    "fp16": Tolerance(min_cosine=0.9995, relative_accuracy=0.999),
    "bf16": Tolerance(min_cosine=0.995, relative_accuracy=0.99),
    "int8": Tolerance(min_cosine=0.98, relative_accuracy=0.99),
    "int8-fp16": Tolerance(min_cosine=0.98, relative_accuracy=0.99),
    "int8-dynamic": Tolerance(min_cosine=0.98, relative_accuracy=0.99),
}
"""By the precision in a runner's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the parity gate measured of one artifact through one runner."""

    runner: str
    """Such as `onnxruntime:fp32`."""
    passed: bool
    embeddings: int
    """How many were compared."""
    min_cosine: float
    mean_cosine: float
    max_abs_difference: float
    top1_agreement: float | None = None
    """Share of labelled pictures that get the label eager float32 gives them; without labelled
    data, share of probes whose nearest neighbour among the other tower's probes is the same."""
    accuracy: float | None = None
    """Zero-shot top-1 on the labelled pictures, the other tower being eager float32's."""
    relative_accuracy: float | None = None
    """The same as a share of eager float32's."""
    runtime_version: str
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What quantising the layers that read one tensor (such as q, k and v) costs, all else left."""

    layers: tuple[str, ...]
    cosine_loss: float
    """1 minus the mean cosine to the fp32 graph, on calibration data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """How an INT8 graph came to be."""

    method: str
    calibration: str
    """What the ranges were measured on."""
    layers: int
    """That could be quantised."""
    excluded: tuple[str, ...] = ()
    """Left in floating point because the gate refused the graph with them."""
    sensitivity: tuple[LayerCost, ...] = ()
    """Measured only when the gate refused; dearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the bundle, as the manifest vouches for it."""

    name: str
    """Its path in the bundle."""
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One tower in one precision."""

    tower: Tower
    kind: Literal["onnx", "tree", "torchscript", "plan"]
    precision: str
    files: tuple[File, ...]
    """The graph and its external data if it has any; or the plan and its sidecar."""
    quantisation: Quantisation | None = None
    engine: Engine | None = None
    """Of a plan."""
    verdicts: tuple[Verdict, ...] = ()

    @property
    def file(self) -> str:
        """Name of the graph itself."""
        return self.files[0].name

    def passed(self, runner: str) -> bool:
        """Whether the gate let this artifact through when run by `runner`."""
        return any(v.passed for v in self.verdicts if v.runner == runner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a bundle's weights come from, and what made its artifacts."""

    source: str
    weights: Literal["trained", "random"]
    """`random` weights have the true architecture's speed and no meaning."""
    weights_sha256: str
    tools: dict[str, str]
    """Package name -> version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How fast a runner was when a repository was assembled from the bundle."""

    tower: Tower
    runner: str
    batch: int
    milliseconds: float
    """Median of a batch."""
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a bundle."""

    format: int
    name: str
    created: str
    """UTC, ISO 8601."""
    architecture: str
    """For people: tower kinds and sizes."""
    activation: Literal["quick_gelu", "gelu"]
    embed_dim: int
    logit_scale: float
    """What cosines are multiplied with before the softmax of zero-shot classification."""
    templates: tuple[str, ...]
    image: ImageSpec
    text: TextSpec
    tokenizer: File
    provenance: Provenance
    artifacts: tuple[Artifact, ...]
    latencies: tuple[Latency, ...] = ()
    """Only in the copy that an assembled repository holds: what its runners were chosen by."""

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return sealed(asdict(self))

    @property
    def files(self) -> tuple[File, ...]:
        """All that it vouches for."""
        return (self.tokenizer, *(file for artifact in self.artifacts for file in artifact.files))


class Bundle:
    """A directory and its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read the manifest of the bundle at `path`.

        Raises:
            BundleError: there is no bundle, or its manifest is not of this format, was edited or
                damaged, or names files outside of the bundle.
        """
        file = path / "manifest.json"
        if not file.exists():
            raise BundleError(
                f"{path} is not a bundle: no manifest.json in it; "
                "make one with `python -m export CHECKPOINT`"
            )
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            found = document.get("format") if isinstance(document, dict) else None
            if found != FORMAT:
                raise BundleError(
                    f"{file}: manifest format {found!r}, this version reads {FORMAT}; "
                    "export the checkpoint again"
                )
            manifest = from_json(Manifest, unsealed(document))
            check_seal(document)
            check_names(vouched.name for vouched in manifest.files)
            return cls(path, manifest)
        except ValueError as error:
            raise BundleError(f"{file}: {error}; export the checkpoint again") from error

    @property
    def tokenizer(self) -> Path:
        """The verified `tokenizer.json`."""
        return self._verified([self.manifest.tokenizer])

    def artifact(self, tower: Tower, precision: str, kind: Graph = "onnx") -> Artifact:
        """The ONNX graph of `tower` in `precision`.

        Raises:
            BundleError: the bundle has none.
        """
        graphs = [a for a in self.manifest.artifacts if (a.tower, a.kind) == (tower, kind)]
        for artifact in graphs:
            if artifact.precision == precision:
                return artifact
        has = sorted(artifact.precision for artifact in graphs)
        tree, option = ("tree ", "--text-tree ") if kind == "tree" else ("", "")
        raise BundleError(
            f"{self.path} has no {precision} {tower} {tree}graph, only {', '.join(has) or 'none'}; "
            f"export the checkpoint again with {option}--precision {precision}"
        )

    def plans(self, tower: Tower, precision: str, library: Library) -> list[Artifact]:
        """The plans of `tower` in `precision`, whatever device they were built on.

        Raises:
            BundleError: the bundle has none.
        """
        plans = [
            a
            for a in self.manifest.artifacts
            if (a.tower, a.kind, a.precision) == (tower, "plan", precision)
            and a.engine is not None
            and a.engine.library == library
        ]
        if not plans:
            raise BundleError(
                f"{self.path} has no {precision} {tower} plan of {library}; build it where it is "
                f"to run: {self.build_command(precision, library)}"
            )
        return plans

    def build_command(self, precision: str, library: Library) -> str:
        """What builds the plans of `precision` for the machine it is run on."""
        return f"python -m export engine {self.path} --engine {library} --precision {precision}"

    def verified(self, artifact: Artifact) -> Path:
        """The path of `artifact`'s graph, after comparing its files with the manifest.

        Raises:
            BundleError: a file is missing, is not the one that was exported, or reads others that
                the manifest does not vouch for.
        """
        path = self._verified(artifact.files)
        if artifact.kind in ("onnx", "tree"):
            check_external_data(path, {Path(file.name).name for file in artifact.files[1:]})
        return path

    def _verified(self, files: Iterable[File]) -> Path:
        paths = [checked_file(self.path, file.name, file.sha256) for file in files]
        return paths[0]


def describe_file(path: Path, root: Path | None = None) -> File:
    """What the manifest of the bundle at `root` (default: the file's folder) says of a file."""
    name = path.relative_to(root or path.parent).as_posix()
    return File(name=name, sha256=sha256_of(path), bytes=path.stat().st_size)
