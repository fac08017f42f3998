"""The schema of benchmark results: `python -m benchmarks` writes them, reports read them.

`results.json` holds the results of one machine. Each section (a latency run, the load on a server,
an accuracy run) carries the environment that it was measured in. Times are medians; everything that
is compared between machines is a ratio to a reference that ran in turns with it.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

from serving.errors import InputError
from serving.util.files import write_text
from serving.util.nvidia import Gpu
from serving.util.typed_json import from_json

SCHEMA = 1
"""Version of the document; a reader refuses any other."""
FILE = "results.json"

Tower = Literal["image", "text"]
Device = Literal["cpu", "cuda"]
Matrix = Literal["short", "full"]
Protocol = Literal["grpc", "http"]
Ensemble = Literal["clip_image", "clip_text"]

_DIGITS = 6
"""Significant digits of a number on disk."""
_EXPANDED = 4
"""Levels of the document that are written over several lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The CPUs of a machine."""

    model: str
    flags: tuple[str, ...]
    """Instruction sets, by Linux's names."""
    usable: int
    """CPUs that the process may use: its affinity mask and its cgroup's quota."""
    online: int | None
    quota: str | None
    """The cgroup's limit as the system states it."""
    governor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The machine, its libraries and the commit that was measured."""

    date: str
    """UTC, ISO 8601."""
    commit: str | None
    machine: str
    """One line for people."""
    cpu: Cpu
    memory_bytes: int
    memory_limit: str | None
    """The cgroup's limit as the system states it."""
    load_average: tuple[float, ...]
    """Over 1, 5 and 15 minutes, when the run began."""
    threads: dict[str, str | None]
    """Environment variables that change how many threads runtimes start."""
    kernel: str
    python: str
    gpu: Gpu | None
    driver: str | None
    torch_cuda: str | None
    libraries: dict[str, str | None]
    """Version of each distribution; None: not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Something that was not measured, and the reason."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a device does at best. Medians on random numbers: zeros are faster than data."""

    matmul_tflops: dict[str, float]
    """By precision: 1e12 operations a second in a product of two squares. `fp32` is without TF32,
    `tf32` the same product with it, `int8` counts integer operations."""
    matmul_size: int
    """Side of the largest of those squares."""
    copy_gb_per_s: float
    """1e9 bytes a second of a copy within the device's memory, bytes read and written together."""
    copy_bytes: int
    without: dict[str, str]
    """Precisions that the device or its libraries do not multiply in, and why."""
    matmul_by: dict[str, str]
    """Library and size that reached a precision's rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Repeated measurements of one call."""

    milliseconds: float
    """Median."""
    quartiles: tuple[float, float]
    """First and third quartile, in milliseconds."""
    rounds: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class InTurns:
    """A call that was timed in turns with a reference."""

    timing: Timing
    """Host to host: NumPy arrays in, NumPy arrays out."""
    reference_ms: float
    """Median of the reference."""
    ratios: tuple[float, ...]
    """How many times faster than the reference, of each pair of adjacent turns."""

    @property
    def ratio(self) -> float:
        """Median of `ratios`: unlike a ratio of medians it does not see the machine drift."""
        return median(self.ratios)


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerLatency(InTurns):
    """One runner on one batch of one tower."""

    tower: Tower
    batch: int
    length: int | None
    """Length of the texts in tokens; None for images."""
    length_run: int | None
    """Tokens that the runner computed: `length`, or the context length where texts are padded."""
    runner: str
    runtime_version: str
    device_timing: Timing | None
    """The batch on the device already, the result staying there; of PyTorch's runners on a GPU."""
    cosine: float
    """Smallest cosine to the reference's embeddings of the same batch."""
    gflop: float
    """1e9 operations of a run, counted; a multiplication and an addition are two."""
    weight_bytes: int
    """Bytes of weights that a run reads: without the table of token embeddings."""

    @property
    def name(self) -> str:
        """Such as `text 8 x 16 tokens, openvino:int8`."""
        work = f"{self.tower} {self.batch}" + (f" x {self.length} tokens" if self.length else "")
        return f"{work}, {self.runner}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLatency(InTurns):
    """One stage between encoded input and embedding, or the whole way."""

    stage: str
    tower: Tower
    items: int
    """Images or texts of a call."""
    runner: str

    @property
    def name(self) -> str:
        """Such as `stage image: decode`."""
        return f"stage {self.stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """A process of its own that opens both towers with one runner and embeds once. Medians."""

    runner: str
    load_s: float
    total_s: float
    """From the start of the process to its end."""
    before_bytes: int
    """Resident memory before the towers are opened."""
    loaded_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model that was measured."""

    name: str
    architecture: str
    weights: Literal["trained", "random"]
    weights_sha256: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRun:
    """One run of the latency benchmark: one model on one device."""

    environment: Environment
    model: Model
    device: Device
    matrix: Matrix
    reference: str
    """Runner that all others took turns with."""
    limits: Limits
    limits_at_end: Limits | None
    """Measured again at the end: how much the device changed. None: the run ended early."""
    towers: tuple[TowerLatency, ...]
    stages: tuple[StageLatency, ...]
    footprints: tuple[Footprint, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def key(self) -> tuple[str, Device, Matrix]:
        """A document holds one run of each key."""
        return self.model.name, self.device, self.matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A model within an ensemble; times are means over its requests."""

    model: str
    queue_ms: float
    """Waiting for other requests of a batch and for an instance."""
    compute_ms: float
    """In the batch that a request was part of, copies in and out included."""
    requests: int
    mean_batch: float
    """Items that ran at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load on one ensemble. Every request carries one item."""

    client: Literal["perf_analyzer", "asyncio"]
    protocol: Protocol
    model: Ensemble
    mode: Literal["concurrency", "rate"]
    load: float
    """Requests in flight, or requests a second at random moments (Poisson)."""
    throughput_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int
    """Requests without an answer, or with an error."""
    stable: bool
    """Whether the windows of the measurement agree."""
    client_cpu_share: float
    """Share of the CPUs, common with the server, that the client took."""
    cache_hits: int
    """Requests that Triton's response cache answered; no tower ran."""
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """The smallest concurrency whose throughput is close to the best one."""

    model: Ensemble
    protocol: Protocol
    concurrency: int
    throughput_per_s: float
    confirmed: bool
    """Whether a higher concurrency was tried and gave no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two independent clients at the same load, three times each, in turns."""

    model: Ensemble
    protocol: Protocol
    concurrency: int
    perf_analyzer_per_s: tuple[float, ...]
    asyncio_per_s: tuple[float, ...]
    ratio: float
    """Median of asyncio's throughputs over the median of perf_analyzer's."""
    agrees: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstEager:
    """JPEG files to embeddings: served, and by a loop around eager float32 on the same machine."""

    images: int
    size: tuple[int, int]
    """Width and height in pixels."""
    runner: str | None
    """Runner of the image tower; None: a running server, which does not report it."""
    served_per_s: float
    """Images a second by `ClipClient`, 16 images a request, 8 requests in flight."""
    eager_per_s: float
    """Images a second of batches of 32."""
    speedup: float
    latency_ms: float
    """Median of one image at a time through the server."""
    largest_difference: float
    """Between the embeddings of the two sides."""
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """A running Triton under load."""

    environment: Environment
    bundle: str
    server: str
    runners: dict[str, str] | None
    """By tower; None: a running server, which does not report them."""
    shares_machine: bool
    """Whether clients and server ran on the same CPUs."""
    response_cache: str
    perf_analyzer: str | None
    """Its version; None: it was not available, and `left_out` has the reason."""
    mix: dict[str, str]
    """By ensemble: what the requests carried."""
    window_s: float
    points: tuple[Point, ...]
    saturation: tuple[Saturation, ...]
    agreement: tuple[Agreement, ...]
    against_eager: AgainstEager | None
    left_out: tuple[LeftOut, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRow:
    """One runner on labelled images. Shares are 0 to 1, intervals are of 95 %."""

    runner: str
    top1: float
    top1_low: float
    top1_high: float
    top5: float | None
    """None with five labels or fewer, where it means nothing."""
    agreement: float
    """Share of images that get the label that eager float32 gives them."""
    difference: float
    """`top1` minus that of eager float32."""
    difference_low: float
    difference_high: float
    passed: bool | None
    """Verdict of the parity gate in the manifest, both towers; None: it gave none."""
    image_ms: float
    """Milliseconds an image."""
    text_ms: float
    """Milliseconds a text: one label in one prompt template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRun:
    """Zero-shot accuracy of every runner on one data set."""

    environment: Environment
    bundle: str
    weights: Literal["trained", "random"]
    dataset: str
    images: int
    labels: int
    templates: tuple[str, ...]
    image_batch: int
    """Images in a timed batch."""
    text_batch: int
    skipped: tuple[str, ...]
    """Images that cannot be read, with the reasons."""
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    methods: dict[str, str]
    """Names of the methods behind the intervals."""
    rows: tuple[AccuracyRow, ...]
    """Eager float32 first, then by descending accuracy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that was measured on one machine."""

    schema: int = SCHEMA
    latency: tuple[LatencyRun, ...] = ()
    load: LoadRun | None = None
    accuracy: AccuracyRun | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a results file, or the one in a directory.

        Raises:
            InputError: there is none, or it is not of this schema.
        """
        file = path / FILE if path.is_dir() else path
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            found = document.get("schema") if isinstance(document, dict) else None
            if found != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, found {found!r}; measure again")
            return from_json(cls, document)
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read as benchmark results: {error}") from error

    def with_latency(self, run: LatencyRun) -> Self:
        """Return these results with `run` in place of an older run of the same key."""
        kept = tuple(old for old in self.latency if old.key != run.key)
        return dataclasses.replace(self, latency=(*kept, run))

    def write(self, path: Path) -> None:
        """Write a results file, or the one in a directory. A number has six significant digits."""
        file = path / FILE if path.is_dir() else path
        write_text(file, _expanded(_rounded(dataclasses.asdict(self)), _EXPANDED) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _expanded(value: Any, levels: int, indent: str = "") -> str:
    """Return JSON text whose first `levels` levels have a line an item: diffs stay readable."""
    if not levels or not isinstance(value, dict | list) or not value:
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {_expanded(v, levels - 1, inner)}" for k, v in value.items()]
    else:
        items = [_expanded(item, levels - 1, inner) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{closing}"
