"""Builds and updates search indexes.

New embeddings are written to the index directory in chunks, each a file that is written atomically.
They are not computed again: a build that was killed resumes where it stopped. Only new and changed
files, by size and modification time, are embedded. The FAISS index is always rebuilt from all
embeddings, which takes seconds where embedding takes hours.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import numpy as np

from serving.errors import InputError, worded
from serving.search.faiss_index import IndexKind, library
from serving.search.index import SearchIndex
from serving.search.resume import Pending, Unfinished
from serving.search.storage import (
    INDEX_FORMAT,
    MANIFEST,
    Entry,
    IndexManifest,
    amend,
    check_model,
    commit,
    index_locked,
)
from serving.tasks.embedder import Embedder, Floats
from serving.tasks.readable import Errors, readable_parts
from serving.util.directories import MISSING, Found, Skipped, find_images, is_directory, problem_of
from serving.util.files import check_directory
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
    ignored: dict[str, int]
    """Number of other files in the directories, by suffix; see `serving.util.directories.Found`."""


def build(
    folder: Path,
    path: Path,
    embedder: Embedder,
    kind: IndexKind | None = None,
    *,
    remove_missing: bool = False,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> IndexChange:
    """Build the index of a directory of images, or update it as `update` does.

    Args:
        folder: directory of images.
        path: directory of the index.
        embedder: embeds the images.
        kind: default: the kind of the existing index, `exact` for a new one.
        remove_missing: see `update`.
        chunk: number of images embedded at a time.
        progress: receives the number of embedded images.

    Raises:
        InputError: there are no images or none of them is readable, or `path` holds the index of
            another directory or model, or other files. The contents of `path` are unchanged.
        ServerError: the server failed; the same call resumes the build.
    """
    library()
    folder = folder.resolve()
    check_directory(path)
    scan = _scan(folder)
    with index_locked(path):
        old = SearchIndex.open(path) if (path / MANIFEST).exists() else None
        if old is not None and old.manifest.folder != str(folder):
            raise InputError(
                f"{path} is the index of {old.manifest.folder}, not of {folder}",
                advice="give another directory for the index; or add the images with `search add`; "
                "or, if the images were moved, use `search update --directory`",
            )
        if old is not None:
            scan.keep_unavailable(old, remove_missing)
        change = _Change(path, old, folder, embedder, chunk, progress)
        return change.apply(scan, kind)


def update(
    path: Path,
    embedder: Embedder,
    folder: Path | None = None,
    *,
    remove_missing: bool = False,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> IndexChange:
    """Embed the new and changed files of an index's directory, and remove the deleted ones.

    An image is removed only if its file is gone and its directory still holds something. An image
    that cannot be read is kept with its last embedding. So are the images of a directory that is
    gone, empty or cannot be listed, such as the mount point of a disk that is not mounted. What is
    kept in this way is listed as skipped.

    Args:
        path: directory of the index.
        embedder: embeds the images.
        folder: directory that the images were moved to; default: unchanged.
        remove_missing: also remove the images of directories that are gone or empty.
        chunk: number of images embedded at a time.
        progress: receives the number of embedded images.

    Raises:
        InputError: see `build`. A directory without images is an error.
    """
    with index_locked(path):
        old = SearchIndex.open(path)
        folder = Path(old.manifest.folder) if folder is None else folder.resolve()
        scan = _scan(folder)
        scan.keep_unavailable(old, remove_missing)
        change = _Change(path, old, folder, embedder, chunk, progress)
        return change.apply(scan, None)


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
        found = Found()
        for picture in pictures:
            whole = picture.parent.resolve() / picture.name
            if is_directory(whole):
                found.add(find_images(whole.resolve()))
            elif problem := problem_of(whole):
                raise InputError(problem, name=str(picture), advice="give images to add")
            else:
                found.files.append(whole)
        added = _Scan(root, found)
        added.keep_unreadable(old)
        tried = {entry.path for entry in added.wanted} | {item.path for item in added.failed}
        added.wanted += [entry for entry in old.entries if entry.path not in tried]
        added.failed += [item for item in old.manifest.skipped if item.path not in tried]
        added.present = added.wanted
        change = _Change(path, old, root, embedder, chunk, progress)
        return change.apply(added, None)


def remove(path: Path, globs: Sequence[str]) -> IndexChange:
    """Remove images from an index by path or glob, in which `*` also matches `/`.

    A path that is in the index is taken literally, even if it has characters such as `[`.

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
        root = Path(old.manifest.folder)
        left = _Scan(root, Found())
        left.wanted = left.present = wanted
        left.failed = list(old.manifest.skipped)
        return _Change(path, old, root, None, CHUNK, silent).apply(left, None)


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

    def apply(self, scan: "_Scan", kind: IndexKind | None) -> IndexChange:
        """Replace the contents of the index by the readable images of `scan`, sorted by path."""
        wanted = scan.wanted
        old = self._old
        held = {entry: row for row, entry in enumerate(old.entries)} if old else {}
        owner = Unfinished(format=INDEX_FORMAT, model=self._model, folder=str(self._folder))
        pending = Pending(self._path, owner, replaceable=old is not None)
        todo = [entry for entry in wanted if entry not in held and entry not in pending]
        resumed = sum(entry in pending and entry not in held for entry in wanted)
        unreadable = self._embed(todo, pending)
        failed = [*scan.failed, *unreadable]
        bad = {item.path for item in unreadable}
        entries = sorted(
            (
                *(entry for entry in wanted if entry in held or entry in pending),
                # Changed files that cannot be used, such as half a copy, keep their old embedding.
                *(entry for entry in held if entry.path in bad),
            ),
            key=lambda entry: entry.path,
        )
        if not any(entry in held or entry in pending for entry in scan.present):
            causes = unreadable or failed
            raise InputError(
                f"none of the {len(causes)} images can be read, such as {causes[0].path}: "
                f"{causes[0].reason}"
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
            ignored=dict(scan.ignored),
        )

    def _embed(self, todo: Sequence[Entry], pending: Pending) -> list[Skipped]:
        """Embed images into `pending`, and return those that cannot be read."""
        failed: list[Skipped] = []
        for start in range(0, len(todo), self._chunk):
            assert self._embedder is not None
            self._progress(f"embedding {len(todo)} images", start, len(todo))
            entries = todo[start : start + self._chunk]
            files, errors = [self._folder / entry.path for entry in entries], Errors()
            parts = readable_parts(self._embedder.embed_images, files, errors)
            if parts:
                embedded = [e for index, e in enumerate(entries) if index not in errors]
                pending.add(embedded, np.concatenate(parts))
            failed += [
                Skipped(path=entries[index].path, reason=worded(error.reason, error.advice))
                for index, error in sorted(errors.items())
            ]
        return failed

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


class _Scan:
    """Files that an index is to hold.

    Args:
        root: directory of the images of the index.
        found: files to look at.
    """

    def __init__(self, root: Path, found: Found) -> None:
        self._root = root
        self.wanted: list[Entry] = []
        """Files with their present size and modification time."""
        self.failed = [self._skipped(item.path, item.reason) for item in found.skipped]
        """Files and directories that cannot be read."""
        self.ignored = found.ignored
        entries: dict[str, Entry] = {}
        for file in found.files:
            try:
                status = file.stat()
            except OSError as error:
                self.failed.append(self._skipped(str(file), f"cannot be read: {error.strerror}"))
                continue
            path = self._name(file)
            entries[path] = Entry(path=path, bytes=status.st_size, mtime_ns=status.st_mtime_ns)
        self.wanted = list(entries.values())
        self.present = self.wanted[:]
        """Files that exist, at least one of which must be readable."""

    def _name(self, file: Path) -> str:
        inside = file.is_relative_to(self._root)
        return (file.relative_to(self._root) if inside else file).as_posix()

    def _skipped(self, path: str, reason: str) -> Skipped:
        return Skipped(path=self._name(Path(path)), reason=reason)

    def keep_unreadable(self, old: SearchIndex) -> None:
        """Keep the old entries of files that cannot be read, and of directories above them."""
        failed = {item.path for item in self.failed}
        present = {entry.path for entry in self.wanted}
        for entry in old.entries:
            above = (parent.as_posix() for parent in PurePath(entry.path).parents)
            if entry.path not in present and (entry.path in failed or not failed.isdisjoint(above)):
                self.wanted.append(entry)

    def keep_unavailable(self, old: SearchIndex, remove_missing: bool) -> None:
        """Keep the old entries whose files are not known to be deleted, and report them.

        Args:
            old: the index.
            remove_missing: do not keep the entries of directories that are gone or empty.
        """
        self.keep_unreadable(old)
        present = {entry.path for entry in self.wanted}
        states: dict[Path, str] = {}
        kept: Counter[tuple[Path, str]] = Counter()
        for entry in old.entries:
            if entry.path in present:
                continue
            file = self._root / entry.path
            if entry.path.startswith("/") and (problem := problem_of(file)) != MISSING:
                self._keep_external(entry, file, problem)
                continue
            missing = self._missing(file.parent, states)
            if missing is None or (remove_missing and missing[1] in (_GONE, _EMPTY)):
                continue
            self.wanted.append(entry)
            kept[missing] += 1
        for (directory, state), count in sorted(kept.items()):
            advice = ""
            if state in (_GONE, _EMPTY):
                advice = "; give --remove-missing-directories if they were deleted"
            reason = f"the directory {state}; {count} images of it are kept in the index{advice}"
            self.failed.append(self._skipped(str(directory), reason))

    def _keep_external(self, entry: Entry, file: Path, problem: str) -> None:
        """Add a file from outside the directory of images, with its present state if possible."""
        if problem:
            self.failed.append(Skipped(path=entry.path, reason=problem))
            self.wanted.append(entry)
        else:
            status = file.stat()
            self.wanted.append(replace(entry, bytes=status.st_size, mtime_ns=status.st_mtime_ns))

    def _missing(self, directory: Path, states: dict[Path, str]) -> tuple[Path, str] | None:
        """Return the topmost directory above a file that is not available, and why; else None."""
        found = None
        while directory != directory.parent and directory != self._root:
            if directory not in states:
                states[directory] = _state(directory)
            if not states[directory]:
                break
            found = directory, states[directory]
            directory = directory.parent
        return found


_GONE, _EMPTY = "does not exist", "is empty"


def _state(directory: Path) -> str:
    """Return why the files of a directory are not available, or "" if it holds any."""
    try:
        with os.scandir(directory) as entries:
            return "" if any(True for _ in entries) else _EMPTY
    except (FileNotFoundError, NotADirectoryError):
        return _GONE
    except OSError as error:
        return f"cannot be listed: {error.strerror}"


def _scan(folder: Path) -> _Scan:
    return _Scan(folder, find_images(folder))
