"""A search index, open: which pictures are nearest to a query?

    index = SearchIndex.open(Path("photos.index"))
    with LocalClip("artifacts/clip") as clip:
        index.find(clip, [Term(text="a beach"), Term(text="people", weight=-0.5)])

How it lies on disk: `search_folder.py`. How it is made and changed: `search_build.py`.
"""

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.bundles.identity import ModelIdentity
from serving.errors import InputError
from serving.search.faiss_index import Index, library, search
from serving.search.query import Term, nearest, query_vector
from serving.search.storage import Entry, IndexManifest, check_model, read_manifest, verify
from serving.tasks.embedder import Embedder, Floats

_BLOCK = 16_384
"""Embeddings copied at a time."""
_ATTEMPTS = 5
"""At reading an index while others replace it."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A picture that a query found."""

    path: str
    """As the index names it; see `Entry`."""
    cosine: float


class SearchIndex:
    """An index, open for reading. What is on disk may be replaced meanwhile; this one stays."""

    def __init__(
        self,
        path: Path,
        manifest: IndexManifest,
        entries: tuple[Entry, ...],
        embeddings: Floats,
        index: Index,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.entries = entries
        self.embeddings = embeddings
        """float32 [n, dim], mapped from the file."""
        self._index = index

    @classmethod
    def open(cls, path: Path) -> "SearchIndex":
        """Open the index in the folder `path`, after comparing its files with the manifest.

        Raises:
            InputError: there is none, it is of another format, or a file is missing or damaged.
        """
        for _ in range(_ATTEMPTS):
            manifest = read_manifest(path)
            try:
                return cls._open(path, manifest)
            except (FileNotFoundError, InputError):
                if read_manifest(path) == manifest:
                    raise
        raise InputError(f"{path} is replaced again and again; try again when that is over")

    @classmethod
    def _open(cls, path: Path, manifest: IndexManifest) -> "SearchIndex":
        for file in manifest.files:
            verify(path, file, manifest)
        faiss = library()
        index = faiss.read_index(str(path / manifest.index.name), faiss.IO_FLAG_MMAP_IFC)
        embeddings = _mapped(path / manifest.embeddings.name)
        lines = (path / manifest.paths.name).read_text(encoding="utf-8").splitlines()
        entries = tuple(Entry(**json.loads(line)) for line in lines)
        return cls(path, manifest, entries, embeddings, index)

    def check(self, model: ModelIdentity) -> None:
        """Refuse what embeds otherwise than this index was embedded.

        Raises:
            InputError: it is another model.
        """
        check_model(self.path, self.manifest.model, model)

    def file(self, path: str) -> Path:
        """Where the picture of an entry or a hit lies."""
        return Path(self.manifest.folder) / path

    def matching(self, globs: Sequence[str]) -> NDArray[np.intp]:
        """Rows whose path fits one of `globs`; `*` also goes over `/`. All without globs.

        Raises:
            InputError: no path does.
        """
        if not globs:
            return np.arange(len(self.entries))
        rows = [
            row
            for row, entry in enumerate(self.entries)
            if any(fnmatch.fnmatchcase(entry.path, glob) for glob in globs)
        ]
        if not rows:
            raise InputError(
                f"no picture of the index fits {' or '.join(map(repr, globs))}; paths are such as "
                f"{self.entries[0].path!r}"
            )
        return np.array(rows, np.intp)

    def search(
        self, queries: Floats, top: int, globs: Sequence[str] = ()
    ) -> tuple[NDArray[np.intp], Floats]:
        """The nearest pictures by cosine.

        With `globs` the fitting pictures are compared exactly, whatever the index's kind.

        Args:
            queries: float32 [q, dim], unit length.
            top: hits a query; with `globs` fewer come back where fewer fit.
            globs: see `matching`.

        Returns:
            Rows [q, hits] into `entries`, best first, and cosines float32 [q, hits].

        Raises:
            InputError: `top` is not 1 to the size of the index, nothing fits the globs, or the
                queries are of another dimension.
        """
        if not 1 <= top <= len(self.entries):
            raise InputError(
                f"asked for {top} hits, {self.path} holds {len(self.entries)} pictures; "
                f"ask for 1 to {len(self.entries)}"
            )
        dim = self.embeddings.shape[1]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise InputError(f"queries are {list(queries.shape)}, expected [q, {dim}]")
        if globs:
            return self._among(self.matching(globs), queries, top)
        cosines, rows = search(self._index, self.manifest.layout, queries, top)
        if (rows < 0).any():  # an approximate index that met too few
            return self._among(self.matching(()), queries, top)
        return rows, cosines

    def find(
        self,
        embedder: Embedder,
        terms: Sequence[Term],
        top: int = 10,
        globs: Sequence[str] = (),
        *,
        truncate: bool = False,
    ) -> list[Hit]:
        """The pictures nearest to a combined query, best first; see `query_vector` and `search`.

        Raises:
            InputError: the embedder is of another model, or see `query_vector` and `search`.
        """
        self.check(embedder.identity)
        query = query_vector(embedder, terms, truncate=truncate)
        rows, cosines = self.search(query[None], top, globs)
        return [
            Hit(self.entries[row].path, float(cosine))
            for row, cosine in zip(rows[0], cosines[0], strict=True)
        ]

    def _among(
        self, rows: NDArray[np.intp], queries: Floats, top: int
    ) -> tuple[NDArray[np.intp], Floats]:
        """Exact search among some rows, a block of them at a time."""
        found = np.empty((len(queries), 0), np.intp)
        cosines = np.empty((len(queries), 0), np.float32)
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            order, values = nearest(queries, self.embeddings[block], top)
            found = np.concatenate([found, block[order]], axis=1)
            cosines = np.concatenate([cosines, values], axis=1)
            best = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
            found = np.take_along_axis(found, best, axis=1)
            cosines = np.take_along_axis(cosines, best, axis=1)
        return found, cosines


def _mapped(file: Path) -> Floats:
    try:
        embeddings: Floats = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:  # of Python objects, which would be unpickled, or no .npy at all
        raise InputError(
            f"{file} holds no embeddings ({error}); where is it from? Build the index again"
        ) from error
    return embeddings
