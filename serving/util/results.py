"""Schema of benchmark results, which `python -m benchmarks` writes and reports read.

`results.json` holds the results of one machine. Each section (a latency run, a load run, an
accuracy run) contains the environment that it was measured in. Times are medians. Values that are
compared between machines are ratios to a reference, measured alternately with it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

from serving.errors import InputError
from serving.util.files import write_text
from serving.util.nvidia import Gpu
from serving.util.typed_json import from_json, json_text, parse_json

SCHEMA = 1
"""Version of the schema; readers reject any other version."""
FILE = "results.json"

Tower = Literal["image", "text"]
Device = Literal["cpu", "cuda"]
Matrix = Literal["short", "full"]
Protocol = Literal["grpc", "http"]
Ensemble = Literal["clip_image", "clip_text"]

_DIGITS = 6
"""Significant digits of numbers in the file."""
_EXPANDED = 4
"""Nesting levels of the document that are written with one line per item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The CPUs of a machine."""

    model: str
    flags: tuple[str, ...]
    """Instruction sets, by their Linux names."""
    usable: int
    """Number of CPUs that the process may use, by its affinity mask and its cgroup's quota."""
    online: int | None
    quota: str | None
    """The cgroup's CPU limit, as reported by the system."""
    governor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The machine, its libraries, and the commit that was measured."""

    date: str
    """UTC, ISO 8601."""
    commit: str | None
    machine: str
    """One-line description for display."""
    cpu: Cpu
    memory_bytes: int
    memory_limit: str | None
    """The cgroup's memory limit, as reported by the system."""
    load_average: tuple[float, ...]
    """Load averages over 1, 5 and 15 minutes at the start of the run."""
    threads: dict[str, str | None]
    """Environment variables that set the number of threads of runtimes."""
    kernel: str
    python: str
    gpu: Gpu | None
    driver: str | None
    torch_cuda: str | None
    libraries: dict[str, str | None]
    """Version of each distribution; None if it is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A measurement that was left out, and the reason."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Measured peak rates of a device. Medians with random numbers, since zeros are faster."""

    matmul_tflops: dict[str, float]
    """Precision -> 1e12 operations/s in a product of two square matrices. `fp32` is computed
    without TF32, `tf32` is the same product with TF32, `int8` counts integer operations."""
    matmul_size: int
    """Side of the largest of those matrices."""
    copy_gb_per_s: float
    """1e9 bytes/s of a copy within the device's memory; counts bytes read and bytes written."""
    copy_bytes: int
    """Size of the copied buffer."""
    without: dict[str, str]
    """Precision -> reason why the device or its libraries do not support it."""
    matmul_by: dict[str, str]
    """Precision -> library and matrix size that reached its rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Repeated measurements of one call."""

    milliseconds: float
    """Median, in milliseconds."""
    quartiles: tuple[float, float]
    """First and third quartile, in milliseconds."""
    rounds: int

    @property
    def spread(self) -> float:
        """Interquartile range divided by the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class InTurns:
    """Timing of a call, measured alternately with a reference."""

    timing: Timing
    """Time from NumPy input arrays to NumPy output arrays, transfers included."""
    reference_ms: float
    """Median time of the reference, in milliseconds."""
    ratios: tuple[float, ...]
    """Speedup over the reference, for each pair of adjacent measurements."""

    @property
    def ratio(self) -> float:
        """Median of `ratios`. Unlike a ratio of medians, it is robust to drift of the machine."""
        return median(self.ratios)


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerLatency(InTurns):
    """Latency of one runner with one batch of one tower."""

    tower: Tower
    batch: int
    length: int | None
    """Length of the texts, in tokens; None for images."""
    length_run: int | None
    """Length that the runner computed: `length`, or the context length if it pads texts to that."""
    runner: str
    runtime_version: str
    device_timing: Timing | None
    """Time with input and result on the device. Only for PyTorch's runners on a GPU."""
    cosine: float
    """Smallest cosine between these embeddings and the reference's, over the batch."""
    gflop: float
    """1e9 operations per run, counted; a multiplication and an addition are two operations."""
    weight_bytes: int
    """Bytes of weights that a run reads, without the table of token embeddings."""

    @property
    def name(self) -> str:
        """Description such as `text 8 x 16 tokens, openvino:int8`."""
        work = f"{self.tower} {self.batch}" + (f" x {self.length} tokens" if self.length else "")
        return f"{work}, {self.runner}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLatency(InTurns):
    """Latency of one stage between encoded input and embedding, or of all stages together."""

    stage: str
    tower: Tower
    items: int
    """Number of images or texts per call."""
    runner: str

    @property
    def name(self) -> str:
        """Description such as `stage image: decode`."""
        return f"stage {self.stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Medians of a separate process that opens both towers with one runner and embeds once."""

    runner: str
    load_s: float
    total_s: float
    """Time from the start of the process to its end."""
    before_bytes: int
    """Resident memory before the towers were opened."""
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
    """Runner that all others were compared with."""
    limits: Limits
    limits_at_end: Limits | None
    """Limits measured again at the end, to show drift; None if the run ended early."""
    towers: tuple[TowerLatency, ...]
    stages: tuple[StageLatency, ...]
    footprints: tuple[Footprint, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def key(self) -> tuple[str, Device, Matrix]:
        """Identity of the run; a results file holds one run for each key."""
        return self.model.name, self.device, self.matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Statistics of one model within an ensemble. Times are means over its requests."""

    model: str
    queue_ms: float
    """Time spent waiting for other requests of a batch and for a model instance."""
    compute_ms: float
    """Compute time of the request's batch, including copies of inputs and outputs."""
    requests: int
    mean_batch: float
    """Mean number of items per batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Measurement of one ensemble at one load. Every request contains one item."""

    client: Literal["perf_analyzer", "asyncio"]
    protocol: Protocol
    model: Ensemble
    mode: Literal["concurrency", "rate"]
    load: float
    """Requests in flight (`concurrency`), or requests/s of a Poisson process (`rate`)."""
    throughput_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int
    """Requests without a response, or with an error."""
    stable: bool
    """True if the measurement windows agree."""
    client_cpu_share: float
    """Share of the CPU time that the client used, on the CPUs that it shares with the server."""
    cache_hits: int
    """Requests answered from Triton's response cache, without running a tower."""
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """The smallest concurrency whose throughput is close to the maximum."""

    model: Ensemble
    protocol: Protocol
    concurrency: int
    throughput_per_s: float
    confirmed: bool
    """True if a higher concurrency was measured and had no higher throughput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Comparison of two independent clients at the same load, alternating, three times each."""

    model: Ensemble
    protocol: Protocol
    concurrency: int
    perf_analyzer_per_s: tuple[float, ...]
    asyncio_per_s: tuple[float, ...]
    ratio: float
    """Median throughput of asyncio divided by that of perf_analyzer."""
    agrees: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstEager:
    """Comparison of the server with a loop around eager float32, from JPEG files to embeddings.

    Both run on the same machine.
    """

    images: int
    size: tuple[int, int]
    """Width and height in pixels."""
    runner: str | None
    """Runner of the image tower; None for an external server, which does not report it."""
    served_per_s: float
    """Images/s with `ClipClient`, 16 images per request, 8 requests in flight."""
    eager_per_s: float
    """Images/s of the eager loop, with batches of 32."""
    speedup: float
    latency_ms: float
    """Median latency of the server with one image at a time."""
    largest_difference: float
    """Largest absolute difference between the embeddings of the two sides."""
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """One run of the load benchmark against a Triton server."""

    environment: Environment
    bundle: str
    server: str
    runners: dict[str, str] | None
    """Tower -> runner; None for an external server, which does not report them."""
    shares_machine: bool
    """True if clients and server ran on the same CPUs."""
    response_cache: str
    perf_analyzer: str | None
    """Version of perf_analyzer; None if it was not available, with the reason in `left_out`."""
    mix: dict[str, str]
    """Ensemble -> description of the requests' content."""
    window_s: float
    points: tuple[Point, ...]
    saturation: tuple[Saturation, ...]
    agreement: tuple[Agreement, ...]
    against_eager: AgainstEager | None
    left_out: tuple[LeftOut, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRow:
    """Accuracy of one runner on labeled images. Shares are 0 to 1; intervals are 95 % intervals."""

    runner: str
    top1: float
    top1_low: float
    top1_high: float
    top5: float | None
    """None with five labels or fewer, when every label is among the top five."""
    agreement: float
    """Share of images that get the same label as with eager float32."""
    difference: float
    """`top1` minus the `top1` of eager float32."""
    difference_low: float
    difference_high: float
    passed: bool | None
    """Verdict of the parity gate in the manifest, for both towers; None if there is none."""
    image_ms: float
    """Milliseconds per image."""
    text_ms: float
    """Milliseconds per text: one label in one prompt template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRun:
    """Zero-shot accuracy of all runners on one data set."""

    environment: Environment
    bundle: str
    weights: Literal["trained", "random"]
    dataset: str
    images: int
    labels: int
    templates: tuple[str, ...]
    image_batch: int
    """Number of images in a timed batch."""
    text_batch: int
    skipped: tuple[str, ...]
    """Images that could not be read, each with the reason."""
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    methods: dict[str, str]
    """Interval -> name of the statistical method."""
    rows: tuple[AccuracyRow, ...]
    """Eager float32 first, then by descending accuracy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All measurements of one machine: the content of `results.json`."""

    schema: int = SCHEMA
    latency: tuple[LatencyRun, ...] = ()
    load: LoadRun | None = None
    accuracy: AccuracyRun | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a results file, or the `results.json` in a directory.

        Raises:
            InputError: the file does not exist, or has another schema.
        """
        file = path / FILE if path.is_dir() else path
        try:
            document = parse_json(file.read_text(encoding="utf-8"))
            found = document.get("schema") if isinstance(document, dict) else None
            if found != SCHEMA:
                raise ValueError(
                    f"expected schema {SCHEMA}, found {found!r}; run the benchmark again"
                )
            return from_json(cls, document)
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read as benchmark results: {error}") from error

    def with_latency(self, run: LatencyRun) -> Self:
        """Return these results with `run` added, replacing a run with the same key."""
        kept = tuple(old for old in self.latency if old.key != run.key)
        return dataclasses.replace(self, latency=(*kept, run))

    def write(self, path: Path) -> None:
        """Write a results file, or `results.json` in a directory, with six significant digits.

        Raises:
            InputError: a number is NaN or infinite; its `name` is the place in the file.
        """
        file = path / FILE if path.is_dir() else path
        document = _rounded(dataclasses.asdict(self))
        json_text(document)  # an error here names the place, one of `_expanded` would not
        write_text(file, _expanded(document, _EXPANDED) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _expanded(value: Any, levels: int, indent: str = "") -> str:
    """Return JSON text with one line per item on the first `levels` levels, for readable diffs."""
    if not levels or not isinstance(value, dict | list) or not value:
        return json_text(value)
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{json_text(k)}: {_expanded(v, levels - 1, inner)}" for k, v in value.items()]
    else:
        items = [_expanded(item, levels - 1, inner) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{closing}"
