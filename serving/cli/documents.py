"""Dataclasses of the JSON documents that commands print with `--json`.

Those of `bulk`, `demo` and `search info` are defined elsewhere: `serving.bulk.job.BulkResult`,
`serving.cli.demo.DemoResult` and `serving.search.storage.IndexManifest`.
"""

from dataclasses import dataclass

from serving.bundles.manifest import Latency
from serving.search.faiss_index import Layout
from serving.search.index import Hit
from serving.tasks.rank import Score
from serving.util.directories import Skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """Document of `assemble`."""

    repository: str
    backend: str
    """Triton backend of the towers; with --fallback it may differ from --backend."""
    models: tuple[str, ...]
    latencies: tuple[Latency, ...]
    """Latencies of the runners that were timed; empty unless the runner is `auto`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Document of `up`, printed when the server is ready."""

    http: str
    grpc: str
    metrics: str
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Document of `status`."""

    url: str
    facts: dict[str, str]
    """Parameters of the model `clip_image`: model, weights, dimension, prompt templates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Document of `embed`."""

    names: tuple[str, ...]
    """Names of the images, then the texts."""
    shape: tuple[int, int]
    embeddings: tuple[tuple[float, ...], ...]
    """Empty with --output."""
    skipped: tuple[Skipped, ...]
    """Images that cannot be used, and links and directories that cannot be read."""
    ignored: dict[str, int]
    """Number of other files in the directories, by suffix; see `serving.util.directories.Found`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """Image of a `Classification`."""

    image: str
    probabilities: dict[str, float]
    """Probabilities by label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Document of `classify`."""

    images: tuple[Classified, ...]
    skipped: tuple[Skipped, ...]
    """See `Embedded`."""
    ignored: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """Image of a `Ranking`."""

    image: str
    texts: tuple[Score, ...]
    """Scores of the texts, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Document of `rank`."""

    images: tuple[Ranked, ...]
    skipped: tuple[Skipped, ...]
    """See `Embedded`."""
    ignored: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Document of `answer`."""

    image: str
    question: str
    answers: tuple[Score, ...]
    """Scores of the answers, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioned:
    """Image of `Captions`."""

    image: str
    caption: str
    best: dict[str, Score]
    """Best word by category."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """Document of `caption`."""

    images: tuple[Captioned, ...]
    skipped: tuple[Skipped, ...]
    """See `Embedded`."""
    ignored: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexChanged:
    """Document of `search build`, `search update`, `search add` and `search remove`."""

    index: str
    images: int
    """Number of images in the index after the change."""
    embedded: int
    resumed: int
    """Images embedded by an earlier command that was interrupted."""
    kept: int
    removed: int
    layout: Layout
    skipped: tuple[Skipped, ...]
    """Images that cannot be used, and directories that cannot be read. Images that were in the
    index before are kept."""
    ignored: dict[str, int]
    """Number of other files in the directories, by suffix; see `serving.util.directories.Found`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundHit:
    """Image found by `search query`."""

    path: str
    """Path in the index."""
    cosine: float
    file: str

    @classmethod
    def of(cls, hit: Hit, file: str) -> "FoundHit":
        """Return a hit together with its file."""
        return cls(path=hit.path, cosine=hit.cosine, file=file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Document of `search query`."""

    index: str
    query: str
    hits: tuple[FoundHit, ...]
    """Images that were found, best first."""
    sheet: str | None
    """Path of the contact sheet, if one was written."""
