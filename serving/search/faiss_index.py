"""FAISS indexes of three kinds, with tuned search parameters.

`exact` compares a query with every embedding. `hnsw` walks a graph of neighbors, `ivf` searches the
nearest of many cells. The search width of these two is set to the smallest value with which they
find the share `TARGET` of the results of an exact search.
"""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.tasks.embedder import Floats
from serving.util.extras import require

IndexKind = Literal["exact", "hnsw", "ivf"]
Index = Any  # faiss ships no stubs

TARGET = 0.95
"""Recall@10 that an approximate index is tuned to."""
_TOP = 10
_QUERIES = 1000
"""Number of queries; one half is for tuning, the other for measuring the recall."""
_QUERY_COSINE = 0.9
"""Cosine between a query and the embedding that it was generated from."""
_BLOCK = 16_384
"""Number of embeddings copied at a time."""
_LINKS, _BUILD_WIDTH = 32, 200
"""HNSW: neighbors per node (0.25 KB per embedding), and candidates while building."""
_TRAINING = 39
"""IVF: minimum of embeddings per cell for FAISS's k-means to run without a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Kind of an index, its parameters and its recall."""

    kind: IndexKind
    parameters: dict[str, int]
    """hnsw: `links`, `build_width`, `width`; ivf: `cells`, `probes`."""
    recall_at_10: float | None = None
    """Share of the 10 nearest neighbors that are found. None for an exact index."""
    recall_queries: int = 0
    """Number of queries that the recall was measured with; see `_queries`."""


def library() -> ModuleType:
    """Return the module `faiss`.

    Raises:
        MissingPackageError: FAISS is not installed.
    """
    require("search", "search", "faiss")
    return importlib.import_module("faiss")


def make(kind: IndexKind, embeddings: Floats) -> tuple[Index, Layout]:
    """Build an inner-product index of float32 [n, dim], unit length, n >= 1, with its layout."""
    faiss = library()
    count, dim = embeddings.shape
    if kind == "exact":
        index, layout = faiss.IndexFlatIP(dim), Layout(kind=kind, parameters={})
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _BUILD_WIDTH
        parameters = {"links": _LINKS, "build_width": _BUILD_WIDTH, "width": 16}
        layout = Layout(kind=kind, parameters=parameters)
    else:
        cells = max(1, min(round(4 * math.sqrt(count)), count // _TRAINING))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).permutation(count)[: 256 * cells]
        index.train(np.ascontiguousarray(embeddings[np.sort(sample)]))
        layout = Layout(kind=kind, parameters={"cells": cells, "probes": 1})
    for block in _blocks(count):
        index.add(np.ascontiguousarray(embeddings[block]))
    return index, layout if kind == "exact" else _tuned(index, layout, embeddings)


def search(index: Index, layout: Layout, queries: Floats, count: int) -> tuple[Any, Any]:
    """Search an index for the `count` nearest embeddings of each query.

    Returns:
        Cosines float32 and rows int64, both [q, count]. A row is -1 if the index found too few.
    """
    faiss, parameters = library(), None
    if layout.kind == "hnsw":
        parameters = faiss.SearchParametersHNSW(efSearch=layout.parameters["width"])
    elif layout.kind == "ivf":
        parameters = faiss.SearchParametersIVF(nprobe=layout.parameters["probes"])
    return index.search(np.ascontiguousarray(queries), count, params=parameters)  # type: ignore[no-any-return]


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


def _tuned(index: Index, layout: Layout, embeddings: Floats) -> Layout:
    """Return `layout` with the smallest width that reaches `TARGET`, and the measured recall."""
    queries, top = _queries(embeddings), min(_TOP, len(embeddings))
    cosines, _ = library().knn(queries, embeddings, top, metric=library().METRIC_INNER_PRODUCT)
    half = (len(queries) + 1) // 2
    name, last = ("probes", layout.parameters.get("cells", 0))
    if layout.kind == "hnsw":
        name, last = "width", 1024
    width = layout.parameters[name]
    while True:
        layout = replace(layout, parameters=layout.parameters | {name: width})
        if width >= last or _recall(index, layout, queries[:half], cosines[:half]) >= TARGET:
            break
        width = min(2 * width, last)
    measured = slice(half, None) if len(queries) > half else slice(None)
    recall = _recall(index, layout, queries[measured], cosines[measured])
    return replace(layout, recall_at_10=recall, recall_queries=len(queries[measured]))


def _queries(embeddings: Floats) -> Floats:
    """Return queries for tuning: a sample of the embeddings with random noise, float32 [q, dim].

    They represent images that are not in the index. Embeddings of texts lie in another region, so
    the recall of text queries may be lower.
    """
    rng = np.random.default_rng(1)
    rows = rng.permutation(len(embeddings))[:_QUERIES]
    sample = np.asarray(embeddings[np.sort(rows)])
    noise = rng.normal(size=sample.shape).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    noisy = sample + np.float32(math.tan(math.acos(_QUERY_COSINE))) * noise
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    queries: Floats = noisy[rng.permutation(len(noisy))]
    return queries


def _recall(index: Index, layout: Layout, queries: Floats, expected: NDArray[np.float32]) -> float:
    """Return the share of `expected`, cosines [q, top] of an exact search, that an index finds.

    Cosines are compared instead of rows, because identical images are interchangeable.
    """
    cosines, rows = search(index, layout, queries, expected.shape[1])
    found = (cosines >= expected[:, -1:] - 1e-5) & (rows >= 0)
    return float(found.mean())
