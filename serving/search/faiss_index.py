"""FAISS indexes of three kinds, and how far the approximate ones must look, measured.

`exact` compares with every embedding. `hnsw` walks a graph of neighbours, `ivf` looks into the
nearest of many cells; how wide they look is set here, to the least that finds `TARGET` of what the
exact search finds.
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
"""Recall@10 that an approximate index is tuned for."""
_TOP = 10
_QUERIES = 1000
"""Half of them to tune on, half to measure on."""
_QUERY_COSINE = 0.9
"""Of a query to the embedding that it was made from."""
_BLOCK = 16_384
"""Embeddings copied at a time."""
_LINKS, _BUILD_WIDTH = 32, 200
"""HNSW: neighbours of a node (0.25 KB an embedding), candidates while building."""
_TRAINING = 39
"""IVF: the fewest embeddings a cell that FAISS's k-means takes without a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which index it is, how it is searched, and what it finds."""

    kind: IndexKind
    parameters: dict[str, int]
    """hnsw: `links`, `build_width`, `width`; ivf: `cells`, `probes`."""
    recall_at_10: float | None = None
    """Share of the 10 nearest by exact search that are found; None: it is exact."""
    recall_queries: int = 0
    """How many queries that was measured with; see `_queries`."""


def library() -> ModuleType:
    """Return the module `faiss`.

    Raises:
        MissingPackageError: it is not installed.
    """
    require("search", "search", "faiss")
    return importlib.import_module("faiss")


def make(kind: IndexKind, embeddings: Floats) -> tuple[Index, Layout]:
    """An index over float32 [n, dim] of unit length, n >= 1, by inner product; and its layout."""
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
    """Cosines float32 and rows int64, both [q, count]; row -1 where an index found too few."""
    faiss, parameters = library(), None
    if layout.kind == "hnsw":
        parameters = faiss.SearchParametersHNSW(efSearch=layout.parameters["width"])
    elif layout.kind == "ivf":
        parameters = faiss.SearchParametersIVF(nprobe=layout.parameters["probes"])
    return index.search(np.ascontiguousarray(queries), count, params=parameters)  # type: ignore[no-any-return]


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


def _tuned(index: Index, layout: Layout, embeddings: Floats) -> Layout:
    """`layout` with the narrowest search that reaches `TARGET`, and its recall on other queries."""
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
    """A sample of the embeddings, each turned away from itself at random, float32 [q, dim].

    Not in the index, and like pictures that are not in it. Texts lie elsewhere than pictures: what
    is found of theirs may be less.
    """
    rng = np.random.default_rng(1)
    rows = rng.permutation(len(embeddings))[:_QUERIES]
    sample = np.asarray(embeddings[np.sort(rows)])
    noise = rng.normal(size=sample.shape).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    turned = sample + np.float32(math.tan(math.acos(_QUERY_COSINE))) * noise
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    queries: Floats = turned[rng.permutation(len(turned))]
    return queries


def _recall(index: Index, layout: Layout, queries: Floats, expected: NDArray[np.float32]) -> float:
    """Share of `expected`, cosines [q, top] of the exact search, that `layout` reaches.

    By cosine and not by row: of equal pictures either is right.
    """
    cosines, rows = search(index, layout, queries, expected.shape[1])
    found = (cosines >= expected[:, -1:] - 1e-5) & (rows >= 0)
    return float(found.mean())
