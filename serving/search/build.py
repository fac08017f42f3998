"""Builds and updates search indexes.

New embeddings are written to the index directory in chunks, each a file that is written atomically.
They are not computed again: a build that was killed resumes where it stopped. Only new and changed
files, by size and modification time, are embedded. The FAISS index is always rebuilt from all
embeddings, which takes seconds where embedding takes hours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.errors import ImageError, InputError, worded
from serving.search.faiss_index import IndexKind, library
from serving.search.index import SearchIndex
from serving.search.resume import Pending, Unfinished
from serving.search.storage import (
    INDEX_FORMAT,
    MANIFEST,
    Entry,
    IndexManifest,
    Skipped,
    amend,
    check_model,
    commit,
    index_locked,
)
from serving.tasks.embedder import Embedder, Floats
from serving.util.directories import find_images
from serving.util.progress import Progress, silent

CHUNK = 256
"""Images per call of `embed_images` and per chunk file. A killed build loses at most so many."""
_BLOCK = 16_384
"""Number of embeddings copied at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexChange:
    """Result of a change of an index."""

    manifest: IndexManifest
    embedded: int
    """Images embedded by this call."""
    resumed: int
    """Images embedded by an earlier call that was interrupted."""
    kept: int
    """Unchanged images that were already in the index."""
    removed: int
    """Images removed from the index."""


def build(
    folder: Path,
    path: Path,
    embedder: Embedder,
    kind: IndexKind | None = None,
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> IndexChange:
    """Build the index of a directory of images, or update it.

    Args:
        folder: directory of images.
        path: directory of the index.
        embedder: embeds the images.
        kind: default: the kind of the existing index, `exact` for a new one.
        chunk: number of images embedded at a time.
        progress: receives the number of embedded images.

    Raises:
        InputError: there are no images or none of them is readable, or `path` holds the index of
            another directory or model, or other files. The contents of `path` are unchanged.
        ServerError: the server failed; the same call resumes the build.
    """
    library()
    folder = folder.resolve()
    wanted, failed = _scan(folder)
    with index_locked(path):
        old = SearchIndex.open(path) if (path / MANIFEST).exists() else None
        if old is not None and old.manifest.folder != str(folder):
            raise InputError(
                f"{path} is the index of {old.manifest.folder}, not of {folder}",
                advice="give another directory for the index; or add the images with `search add`; "
                "or, if the images were moved, use `search update --directory`",
            )
        change = _Change(path, old, folder, embedder, chunk, progress)
        return change.apply(_with_external_files(old, wanted), failed, kind)


def update(
    path: Path,
    embedder: Embedder,
    folder: Path | None = None,
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> IndexChange:
    """Embed the new and changed files of an index's directory, and remove the deleted ones.

    Args:
        path: directory of the index.
        embedder: embeds the images.
        folder: directory that the images were moved to; default: unchanged.
        chunk: number of images embedded at a time.
        progress: receives the number of embedded images.

    Raises:
        InputError: see `build`. A directory without images is an error.
    """
    with index_locked(path):
        old = SearchIndex.open(path)
        folder = Path(old.manifest.folder) if folder is None else folder.resolve()
        wanted, failed = _scan(folder)
        change = _Change(path, old, folder, embedder, chunk, progress)
        return change.apply(_with_external_files(old, wanted), failed, None)


def add(
    path: Path,
    pictures: Sequence[Path],
    embedder: Embedder,
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> IndexChange:
    """Add images to an index. Images that it already has are embedded again only if changed.

    Args:
        path: directory of the index.
        pictures: files, or directories of them.
        embedder: embeds the images.
        chunk: number of images embedded at a time.
        progress: receives the number of embedded images.

    Raises:
        InputError: see `build`, or a file does not exist.
    """
    with index_locked(path):
        old = SearchIndex.open(path)
        root = Path(old.manifest.folder)
        files: list[Path] = []
        for picture in pictures:
            whole = picture.parent.resolve() / picture.name
            if not whole.exists():
                raise InputError(
                    f"{picture}: no such file or directory", advice="give images to add"
                )
            files += find_images(whole.resolve()) if whole.is_dir() else [whole]
        added, failed = _entries(files, root)
        tried = {entry.path for entry in added} | {item.path for item in failed}
        wanted = [entry for entry in old.entries if entry.path not in tried]
        failed += [item for item in old.manifest.skipped if item.path not in tried]
        change = _Change(path, old, root, embedder, chunk, progress)
        return change.apply([*wanted, *added], failed, None)


def remove(path: Path, globs: Sequence[str]) -> IndexChange:
    """Remove images from an index by path or glob, in which `*` also matches `/`.

    The image files are not deleted.

    Raises:
        InputError: a path or glob matches nothing, or the index would become empty.
    """
    with index_locked(path):
        old = SearchIndex.open(path)
        rows = {row for glob in globs for row in old.matching([glob]).tolist()}
        wanted = [entry for row, entry in enumerate(old.entries) if row not in rows]
        if not wanted:
            raise InputError(
                f"that would remove all {len(old.entries)} images",
                advice=f"delete {path} instead",
            )
        change = _Change(path, old, Path(old.manifest.folder), None, CHUNK, silent)
        return change.apply(wanted, list(old.manifest.skipped), None)


class _Change:
    """A change of an index, made while its lock is held."""

    def __init__(
        self,
        path: Path,
        old: SearchIndex | None,
        folder: Path,
        embedder: Embedder | None,
        chunk: int,
        progress: Progress,
    ) -> None:
        self._path, self._old, self._folder = path, old, folder
        self._embedder, self._chunk, self._progress = embedder, chunk, progress
        if embedder is None:
            assert old is not None
            self._model = old.manifest.model
        else:
            self._model = embedder.identity
        if old is not None:
            check_model(path, old.manifest.model, self._model)

    def apply(
        self, wanted: Sequence[Entry], failed: list[Skipped], kind: IndexKind | None
    ) -> IndexChange:
        """Replace the contents of the index by the readable images of `wanted`, sorted by path."""
        old = self._old
        held = {entry: row for row, entry in enumerate(old.entries)} if old else {}
        owner = Unfinished(format=INDEX_FORMAT, model=self._model, folder=str(self._folder))
        pending = Pending(self._path, owner, replaceable=old is not None)
        todo = [entry for entry in wanted if entry not in held and entry not in pending]
        resumed = sum(entry in pending and entry not in held for entry in wanted)
        unreadable = self._embed(todo, pending)
        failed = [*failed, *unreadable]
        entries = sorted(
            (entry for entry in wanted if entry in held or entry in pending),
            key=lambda entry: entry.path,
        )
        if not entries:
            raise InputError(
                f"none of the {len(failed)} images can be read, such as {failed[0].path}: "
                f"{failed[0].reason}"
            )
        failed.sort(key=lambda item: item.path)
        kind = kind or (old.manifest.layout.kind if old else "exact")
        if old and tuple(entries) == old.entries and kind == old.manifest.layout.kind:
            manifest = amend(self._path, old.manifest, self._folder, failed)
        else:
            manifest = self._commit(entries, failed, kind, held, pending)
        pending.drop()
        paths = {entry.path for entry in entries}
        return IndexChange(
            manifest=manifest,
            embedded=len(todo) - len(unreadable),
            resumed=resumed,
            kept=sum(entry in held for entry in entries),
            removed=sum(entry.path not in paths for entry in held),
        )

    def _embed(self, todo: Sequence[Entry], pending: Pending) -> list[Skipped]:
        """Embed images into `pending`, and return those that cannot be read."""
        failed: list[Skipped] = []
        for start in range(0, len(todo), self._chunk):
            self._progress(f"embedding {len(todo)} images", start, len(todo))
            entries = todo[start : start + self._chunk]
            embedded, embeddings, unreadable = self._embed_readable(entries)
            failed += unreadable
            if embedded:
                pending.add(embedded, np.concatenate(embeddings))
        return failed

    def _embed_readable(
        self, entries: Sequence[Entry]
    ) -> tuple[list[Entry], list[Floats], list[Skipped]]:
        """Return the readable entries, their embeddings in parts, and the unreadable entries."""
        assert self._embedder is not None
        embedded: list[Entry] = []
        parts: list[Floats] = []
        failed: list[Skipped] = []
        rest = list(entries)
        while rest:
            try:
                parts.append(self._embedder.embed_images([self._folder / e.path for e in rest]))
            except ImageError as error:
                if error.index is None:
                    raise  # the error is not about one of these images
                bad, reason = error.index, worded(error.reason, error.advice)
            else:
                return embedded + rest, parts, failed
            before = self._embed_readable(rest[:bad])
            embedded, parts = embedded + before[0], parts + before[1]
            failed += [*before[2], Skipped(path=rest[bad].path, reason=reason)]
            rest = rest[bad + 1 :]
        return embedded, parts, failed

    def _commit(
        self,
        entries: Sequence[Entry],
        failed: Sequence[Skipped],
        kind: IndexKind,
        held: dict[Entry, int],
        pending: Pending,
    ) -> IndexManifest:
        old = self._old
        rows = {entry: row for row, entry in enumerate(entries)}
        kept = [(row, held[entry]) for entry, row in rows.items() if entry in held]

        def fill(out: Floats) -> None:
            pending.fill({entry: row for entry, row in rows.items() if entry not in held}, out)
            for start in range(0, len(kept), _BLOCK):
                targets, sources = zip(*kept[start : start + _BLOCK], strict=True)
                assert old is not None
                out[list(targets)] = old.embeddings[list(sources)]

        self._progress(f"indexing {len(entries)} images ({kind})")
        return commit(
            self._path,
            old.manifest if old else None,
            model=self._model if old is None else old.manifest.model,
            folder=self._folder,
            kind=kind,
            entries=entries,
            skipped=failed,
            fill=fill,
        )


def _scan(folder: Path) -> tuple[list[Entry], list[Skipped]]:
    return _entries(find_images(folder), folder)


def _entries(files: Iterable[Path], root: Path) -> tuple[list[Entry], list[Skipped]]:
    """Return the files with their size and modification time, and those that are inaccessible."""
    found: dict[str, Entry] = {}
    failed: dict[str, Skipped] = {}
    for file in files:
        path = (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()
        try:
            status = file.stat()
        except OSError as error:
            failed[path] = Skipped(path=path, reason=f"cannot be read: {error}")
            continue
        found[path] = Entry(path=path, bytes=status.st_size, mtime_ns=status.st_mtime_ns)
    return list(found.values()), list(failed.values())


def _with_external_files(old: SearchIndex | None, wanted: list[Entry]) -> list[Entry]:
    """Return `wanted` and the index's existing files from outside its directory of images."""
    paths = [Path(e.path) for e in old.entries if e.path.startswith("/")] if old else []
    present, _ = _entries((path for path in paths if path.exists()), Path("/nowhere"))
    return [*wanted, *present]
