"""Search in an index: the images that are nearest to a query.

    index = SearchIndex.open(Path("photos.index"))
    with LocalClip("artifacts/clip") as clip:
        index.find(clip, [Term(text="a beach"), Term(text="people", weight=-0.5)])

`serving.search.storage` describes the files of an index, `serving.search.build` writes them.
"""

import fnmatch
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
from serving.util.typed_json import parse_json

_BLOCK = 16_384
"""Number of embeddings copied at a time."""
_ATTEMPTS = 5
"""Attempts to open an index while another process replaces it."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Image found by a query."""

    path: str
    """Path in the index; see `Entry`."""
    cosine: float


class SearchIndex:
    """Index that is open for reading. It stays valid if the files on disk are replaced."""

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
        """float32 [n, dim], memory-mapped."""
        self._index = index

    @classmethod
    def open(cls, path: Path) -> "SearchIndex":
        """Open the index in the directory `path` after verifying its files.

        Raises:
            InputError: there is no index, it has another format, or a file is missing or damaged.
        """
        for _ in range(_ATTEMPTS):
            manifest = read_manifest(path)
            try:
                return cls._open(path, manifest)
            except (FileNotFoundError, InputError):
                if read_manifest(path) == manifest:
                    raise
        raise InputError(
            f"{path} was replaced during each of {_ATTEMPTS} attempts to read it",
            advice="try again later",
        )

    @classmethod
    def _open(cls, path: Path, manifest: IndexManifest) -> "SearchIndex":
        for file in manifest.files:
            verify(path, file, manifest)
        faiss = library()
        # FAISS takes only paths in UTF-8; that of a descriptor is ASCII.
        with (path / manifest.index.name).open("rb") as opened:
            index = faiss.read_index(f"/proc/self/fd/{opened.fileno()}", faiss.IO_FLAG_MMAP_IFC)
        embeddings = _mapped(path / manifest.embeddings.name)
        lines = (path / manifest.paths.name).read_text(encoding="utf-8").splitlines()
        entries = tuple(Entry(**parse_json(line)) for line in lines)
        return cls(path, manifest, entries, embeddings, index)

    def check(self, model: ModelIdentity) -> None:
        """Check that embeddings of `model` can be compared with those of this index.

        Raises:
            InputError: the index was built with another model.
        """
        check_model(self.path, self.manifest.model, model)

    def file(self, path: str) -> Path:
        """Return the image file of an entry or a hit."""
        return Path(self.manifest.folder) / path

    def matching(self, globs: Sequence[str]) -> NDArray[np.intp]:
        """Return the rows whose path matches one of `globs`, or all rows if there are no globs.

        `*` also matches `/`. A glob that is a path of the index matches only that path, even if it
        has characters such as `[`.

        Raises:
            InputError: no path matches.
        """
        if not globs:
            return np.arange(len(self.entries))
        exact = {entry.path for entry in self.entries}.intersection(globs)
        patterns = [glob for glob in globs if glob not in exact]
        rows = [
            row
            for row, entry in enumerate(self.entries)
            if entry.path in exact or any(fnmatch.fnmatchcase(entry.path, p) for p in patterns)
        ]
        if not rows:
            raise InputError(
                f"no path in the index matches {' or '.join(map(repr, globs))}",
                advice=f"give paths such as {self.entries[0].path!r}",
            )
        return np.array(rows, np.intp)

    def search(
        self, queries: Floats, top: int, globs: Sequence[str] = ()
    ) -> tuple[NDArray[np.intp], Floats]:
        """Find the nearest images by cosine.

        With `globs` the search among the matching images is exact, whatever the kind of the index.

        Args:
            queries: float32 [q, dim], unit length.
            top: hits per query; fewer are returned if fewer images match `globs`.
            globs: see `matching`.

        Returns:
            Rows [q, hits] into `entries`, best first, and cosines float32 [q, hits].

        Raises:
            InputError: `top` is not between 1 and the size of the index, no path matches the
                globs, or the queries have another dimension.
        """
        if not 1 <= top <= len(self.entries):
            raise InputError(
                f"asked for {top} hits, but {self.path} holds {len(self.entries)} images",
                advice=f"ask for 1 to {len(self.entries)}",
            )
        dim = self.embeddings.shape[1]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise InputError(f"expected queries of shape [q, {dim}], got {list(queries.shape)}")
        if globs:
            return self._search_rows(self.matching(globs), queries, top)
        cosines, rows = search(self._index, self.manifest.layout, queries, top)
        if (rows < 0).any():  # an approximate index found too few
            return self._search_rows(self.matching(()), queries, top)
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
        """Find the images that are nearest to a combined query, best first.

        See `query_vector` for the query, and `search` for the other arguments.

        Raises:
            InputError: the index was built with another model than `embedder`, or see
                `query_vector` and `search`.
        """
        self.check(embedder.identity)
        query = query_vector(embedder, terms, truncate=truncate)
        rows, cosines = self.search(query[None], top, globs)
        return [
            Hit(self.entries[row].path, float(cosine))
            for row, cosine in zip(rows[0], cosines[0], strict=True)
        ]

    def _search_rows(
        self, rows: NDArray[np.intp], queries: Floats, top: int
    ) -> tuple[NDArray[np.intp], Floats]:
        """Search `rows` exactly, one block at a time."""
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
    except ValueError as error:  # not a .npy file, or pickled Python objects, which are not loaded
        raise InputError(
            f"{file} holds no embeddings ({error})",
            advice="do not trust this file; build the index again",
        ) from error
    return embeddings
