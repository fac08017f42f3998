"""The manifest of a bundle: facts of the model, its artifacts, and the verdicts of the parity gate.

`manifest.json` is the single source of truth about a bundle. These dataclasses are its schema:
`Manifest.to_json` writes it, `serving.bundles.bundle` reads and checks it.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from serving.bundles.engine_facts import Engine
from serving.bundles.integrity import sealed

MANIFEST_FORMAT = 3
"""Of `manifest.json`; a reader refuses any other."""

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, Tower] = ("image", "text")

Graph = Literal["image", "text", "prefix_tree"]
"""The graph of a tower; `prefix_tree` is the text tower that computes shared prefixes once, over
trees of tokens (`serving.inputs.prefix_tree`)."""

TOWER_OF: dict[Graph, Tower] = {"image": "image", "text": "text", "prefix_tree": "text"}
"""The tower whose embeddings a graph computes."""

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
    """One graph in one precision, as a file of one kind."""

    graph: Graph
    kind: Literal["onnx", "torchscript", "engine"]
    precision: str
    files: tuple[File, ...]
    """The graph and its external data if it has any; or the engine and its sidecar."""
    quantisation: Quantisation | None = None
    engine: Engine | None = None
    """Facts of an engine."""
    verdicts: tuple[Verdict, ...] = ()

    @property
    def tower(self) -> Tower:
        """The tower whose embeddings it computes."""
        return TOWER_OF[self.graph]

    @property
    def file(self) -> str:
        """Name of the graph itself."""
        return self.files[0].name

    def passed(self, runner: object) -> bool:
        """Return whether this artifact passed the gate when run by `runner`, a name or a spec."""
        return any(v.passed for v in self.verdicts if v.runner == str(runner))


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
