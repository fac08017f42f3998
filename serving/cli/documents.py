"""The JSON documents that commands print with `--json`, as dataclasses.

Those of `bulk`, `demo` and `search info` lie with what makes them: `serving.bulk.job.BulkResult`,
`serving.cli.demo.DemoResult`, `serving.search.storage.IndexManifest`.
"""

from dataclasses import dataclass

from serving.bundles.manifest import Latency
from serving.search.faiss_index import Layout
from serving.search.index import Hit
from serving.search.storage import Skipped
from serving.tasks.rank import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """`assemble`"""

    repository: str
    backend: str
    """Triton backend of the towers; with --fallback it may not be the one asked for."""
    models: tuple[str, ...]
    latencies: tuple[Latency, ...]
    """Of the runners that were timed; empty if one was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """`up`, once the server is ready"""

    http: str
    grpc: str
    metrics: str
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """`status`"""

    url: str
    facts: dict[str, str]
    """Parameters of the model `clip_image`: model, weights, dimension, prompt templates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """`embed`"""

    names: tuple[str, ...]
    """Images first, then texts."""
    shape: tuple[int, int]
    embeddings: tuple[tuple[float, ...], ...]
    """Empty with --output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """`classify`: a list, an item an image"""

    image: str
    probabilities: dict[str, float]
    """By label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """`rank`: a list, an item an image"""

    image: str
    texts: tuple[Score, ...]
    """Best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """`answer`"""

    image: str
    question: str
    answers: tuple[Score, ...]
    """Best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioned:
    """`caption`: a list, an item an image"""

    image: str
    caption: str
    best: dict[str, Score]
    """By category."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexChanged:
    """`search build`, `update`, `add` and `remove`"""

    index: str
    images: int
    """In the index now."""
    embedded: int
    resumed: int
    """Embedded before, by a build that was stopped."""
    kept: int
    removed: int
    layout: Layout
    skipped: tuple[Skipped, ...]
    """Images that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundHit:
    """An image that `search query` found"""

    path: str
    """As the index names it."""
    cosine: float
    file: str

    @classmethod
    def of(cls, hit: Hit, file: str) -> "FoundHit":
        """Return a hit with its file."""
        return cls(path=hit.path, cosine=hit.cosine, file=file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`search query`"""

    index: str
    query: str
    hits: tuple[FoundHit, ...]
    """Best first."""
    sheet: str | None
    """The contact sheet that was written."""
