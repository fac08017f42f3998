"""The manifest of a bundle: facts of the model, its artifacts, and the verdicts of the parity gate.

`manifest.json` is the single source of truth about a bundle. These dataclasses are its schema.
`Manifest.to_json` writes the file; `serving.bundles.bundle` reads and checks it.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from serving.bundles.engine_facts import Engine
from serving.bundles.integrity import sealed
from serving.util.finite import FLOAT32_MAX, INT32_MAX

MANIFEST_FORMAT = 3
"""Format version of `manifest.json`; readers reject any other version."""

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, Tower] = ("image", "text")

Graph = Literal["image", "text", "prefix_tree"]
"""The graph of a tower. `prefix_tree` is the text tower over trees of tokens, which computes shared
prefixes once (`serving.inputs.prefix_tree`)."""

TOWER_OF: dict[Graph, Tower] = {"image": "image", "text": "text", "prefix_tree": "text"}
"""The tower whose embeddings a graph computes."""

DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""Prompt templates of checkpoints that do not define their own (Radford et al. 2021, 3.1.4)."""

SMALLEST_STD = 1e-3
"""Minimum standard deviation of a channel, for pixels scaled to 0..1. CLIP models have 0.2 to 1."""

TEXT_BUCKETS = (8, 16, 24, 32, 48)
"""Lengths, in tokens, that batches of texts are padded to. The context length is added to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """Preprocessing of images: resize and crop on the CPU, normalization inside the image graph."""

    size: int
    """Side of the image tower's square input, in pixels."""
    resize: int
    """Length of the shorter edge after the resize that precedes the center crop, in pixels. With
    `squash`, that of both edges."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    mean: tuple[float, float, float]
    """Mean of each channel, for pixels scaled to 0..1. Applied inside the image graph."""
    std: tuple[float, float, float]
    """Standard deviation of each channel, applied like `mean`."""
    pipeline: Literal["openai", "huggingface"]
    """Reference pipeline to reproduce. `openai` (also OpenCLIP) resizes, then converts to RGB, and
    rounds the crop's offset half to even; `huggingface` converts first and rounds it down."""
    resize_mode: Literal["shortest", "squash"] = "shortest"
    """`shortest` keeps the aspect ratio; `squash` resizes to a square, as DFN's models do."""
    exif_orientation: bool = False
    """Rotate and mirror images as their EXIF orientation says. The references ignore it."""
    scale_16_bit: bool = False
    """Scale 16-bit grayscale images to 8 bits. The references clip their values at 255."""

    def check(self, prefix: str = "") -> None:
        """Check that mean and standard deviation can normalize pixels scaled to 0..1.

        Raises:
            ValueError: a mean is not from 0 to 1, or a standard deviation is not from
                `SMALLEST_STD` to 1. The message begins with `prefix` and the field.
        """
        for name, lowest in (("mean", 0.0), ("std", SMALLEST_STD)):
            for channel, value in enumerate(getattr(self, name)):
                if not lowest <= value <= 1:
                    raise ValueError(
                        f"{prefix}{name}[{channel}]: expected {lowest:g} to 1, for pixels scaled "
                        f"to 0..1, found {value:g}"
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """Tokenization of texts."""

    context_length: int
    vocab_size: int
    start_id: int
    end_id: int
    """The end-of-text token: the text tower pools at its first occurrence."""
    pad_id: int
    """Follows the end-of-text token; causal attention makes its value irrelevant to the result."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths that batches are padded to, ascending; the last is the context length."""
        return (*(b for b in TEXT_BUCKETS if b < self.context_length), self.context_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Maximum deviation of a runner's embeddings from those of eager float32."""

    min_cosine: float
    """Smallest cosine of any pair of embeddings, not the mean."""
    relative_accuracy: float
    """Zero-shot top-1 accuracy as a share of eager float32's, if there is labeled data."""
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
"""Tolerance by the precision of a runner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The parity gate's verdict on one artifact and one runner, with its measurements."""

    runner: str
    """Name of the runner, such as `onnxruntime:fp32`."""
    passed: bool
    embeddings: int
    """Number of embeddings that were compared."""
    min_cosine: float
    mean_cosine: float
    max_abs_difference: float
    top1_agreement: float | None = None
    """Share of labeled images that get the same label as with eager float32. Without labeled data:
    share of probes whose nearest neighbor among the other tower's probes is the same."""
    accuracy: float | None = None
    """Zero-shot top-1 accuracy on labeled images; eager float32 runs the other tower."""
    relative_accuracy: float | None = None
    """`accuracy` as a share of eager float32's."""
    runtime_version: str
    machine: str
    reason: str | None = None
    """Reason of a failure that the numbers do not show, such as embeddings that are not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """Cost of quantizing only the layers that read one tensor, such as q, k and v."""

    layers: tuple[str, ...]
    cosine_loss: float
    """1 minus the mean cosine to the fp32 graph, on calibration data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """Quantization parameters of an INT8 graph."""

    method: str
    calibration: str
    """Description of the data that the activation ranges were measured on."""
    layers: int
    """Number of layers that can be quantized."""
    excluded: tuple[str, ...] = ()
    """Layers left in floating point because the graph fails the parity gate with them quantized."""
    sensitivity: tuple[LayerCost, ...] = ()
    """Measured only if the graph failed the parity gate; highest cost first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """The manifest's entry of one file of the bundle."""

    name: str
    """Path relative to the bundle."""
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One graph in one precision and one file format."""

    graph: Graph
    kind: Literal["onnx", "torchscript", "engine"]
    precision: str
    files: tuple[File, ...]
    """The graph and its external data if it has any, or the engine and its sidecar."""
    quantisation: Quantisation | None = None
    engine: Engine | None = None
    """Build parameters of an engine; None for graphs."""
    verdicts: tuple[Verdict, ...] = ()

    @property
    def tower(self) -> Tower:
        """The tower whose embeddings the artifact computes."""
        return TOWER_OF[self.graph]

    @property
    def file(self) -> str:
        """Name of the file with the graph or engine itself."""
        return self.files[0].name

    def passed(self, runner: object) -> bool:
        """Return whether this artifact passed the parity gate with `runner`, a name or a spec."""
        return any(v.passed for v in self.verdicts if v.runner == str(runner))


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """The origin of a bundle's weights, and the tools that made its artifacts."""

    source: str
    weights: Literal["trained", "random"]
    """`random` weights run as fast as trained ones, but their embeddings are meaningless."""
    weights_sha256: str
    tools: dict[str, str]
    """Package name -> version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Latency of a runner, measured when a model repository was assembled from the bundle."""

    tower: Tower
    runner: str
    batch: int
    milliseconds: float
    """Median time of a batch."""
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    format: int
    name: str
    created: str
    """UTC, ISO 8601."""
    architecture: str
    """Description of the towers' types and sizes, for display."""
    activation: Literal["quick_gelu", "gelu"]
    embed_dim: int
    logit_scale: float
    """Factor applied to cosines before the softmax of zero-shot classification."""
    templates: tuple[str, ...]
    image: ImageSpec
    text: TextSpec
    tokenizer: File
    provenance: Provenance
    artifacts: tuple[Artifact, ...]
    latencies: tuple[Latency, ...] = ()
    """Timings that selected the runners. Only in the manifest of an assembled model repository."""

    def check(self) -> None:
        """Check that the numbers are in the ranges that a model can have.

        Raises:
            ValueError: a number is not; the message names the field.
        """
        sizes = {
            "embed_dim": self.embed_dim,
            "image.size": self.image.size,
            "image.resize": self.image.resize,
            "text.context_length": self.text.context_length,
            "text.vocab_size": self.text.vocab_size,
        }
        for name, size in sizes.items():
            if not 1 <= size <= INT32_MAX:
                raise ValueError(f"{name}: expected 1 to {INT32_MAX:,}, found {size}")
        for name in ("start_id", "end_id", "pad_id"):
            if not 0 <= (number := getattr(self.text, name)) < self.text.vocab_size:
                raise ValueError(f"text.{name}: expected an id of the vocabulary, found {number}")
        if not 0 < self.logit_scale <= FLOAT32_MAX:
            raise ValueError(
                "logit_scale: expected a number greater than 0 and finite in float32, found "
                f"{self.logit_scale:g}"
            )
        self.image.check("image.")

    def to_json(self) -> str:
        """Return the text of `manifest.json`.

        Raises:
            InputError: a number is NaN or infinite; its `name` is the field.
        """
        return sealed(asdict(self))

    @property
    def files(self) -> tuple[File, ...]:
        """All files that the manifest lists."""
        return (self.tokenizer, *(file for artifact in self.artifacts for file in artifact.files))
