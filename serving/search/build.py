"""Making and changing a search index: which pictures to embed, and the way there that survives.

Embeddings are written chunk by chunk to the index's folder, each chunk a file that appears whole.
Whatever is embedded there is not embedded again: a build that was killed goes on where it was. Only
new and changed files are embedded (by size and time of change); the FAISS index itself is made anew
from all embeddings, which costs seconds where embedding costs hours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.errors import ImageError, InputError
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
"""Pictures a call of `embed_images`, and a file: so many are lost at most when it is killed."""
_BLOCK = 16_384
"""Embeddings copied at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexChange:
    """What a change of an index came to."""

    manifest: IndexManifest
    embedded: int
    """Pictures embedded by this call."""
    resumed: int
    """Pictures that a call before this one embedded and did not get to use."""
    kept: int
    """Pictures that the index held already, unchanged."""
    removed: int
    """Pictures that it held and no longer holds."""


def build(
    folder: Path,
    path: Path,
    embedder: Embedder,
    kind: IndexKind | None = None,
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> IndexChange:
    """Make the index in `path` hold the pictures of `folder`, whatever of it is there already.

    Args:
        kind: default: the kind it has, `exact` where it is new.
        chunk: pictures embedded at a time.

    Raises:
        InputError: no pictures, none of them readable, or `path` holds another folder's index,
            another model's, or something else. What is there stays as it is.
        ServerError: the server failed; the same call goes on.
    """
    library()
    folder = folder.resolve()
    wanted, failed = _scan(folder)
    with index_locked(path):
        old = SearchIndex.open(path) if (path / MANIFEST).exists() else None
        if old is not None and old.manifest.folder != str(folder):
            raise InputError(
                f"{path} holds the pictures of {old.manifest.folder}, not of {folder}; give "
                "another folder for the index, or `search add` them to it, or, if they are the "
                "same in another place, `search update --directory`"
            )
        work = _Work(path, old, folder, embedder, chunk, progress)
        return work.bring(_with_outsiders(old, wanted), failed, kind)


def update(
    path: Path,
    embedder: Embedder,
    folder: Path | None = None,
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> IndexChange:
    """Follow the files: new and changed ones are embedded, those that are gone are removed.

    Args:
        folder: where the pictures are now; default: where they were.

    Raises:
        InputError: see `build`; a folder without any picture is taken for a mistake.
    """
    with index_locked(path):
        old = SearchIndex.open(path)
        folder = Path(old.manifest.folder) if folder is None else folder.resolve()
        wanted, failed = _scan(folder)
        work = _Work(path, old, folder, embedder, chunk, progress)
        return work.bring(_with_outsiders(old, wanted), failed, None)


def add(
    path: Path,
    pictures: Sequence[Path],
    embedder: Embedder,
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> IndexChange:
    """Add files and folders of files; those that the index holds are embedded again if changed.

    Raises:
        InputError: see `build`; or there is no such file.
    """
    with index_locked(path):
        old = SearchIndex.open(path)
        root = Path(old.manifest.folder)
        files: list[Path] = []
        for picture in pictures:
            whole = picture.parent.resolve() / picture.name
            if not whole.exists():
                raise InputError(f"{picture}: no such file or folder; give pictures to add")
            files += find_images(whole.resolve()) if whole.is_dir() else [whole]
        added, failed = _entries(files, root)
        tried = {entry.path for entry in added} | {item.path for item in failed}
        wanted = [entry for entry in old.entries if entry.path not in tried]
        failed += [item for item in old.manifest.skipped if item.path not in tried]
        work = _Work(path, old, root, embedder, chunk, progress)
        return work.bring([*wanted, *added], failed, None)


def remove(path: Path, globs: Sequence[str]) -> IndexChange:
    """Take pictures out of the index, by path or glob (`*` also goes over `/`); files stay.

    Raises:
        InputError: one of them fits nothing, or nothing would be left.
    """
    with index_locked(path):
        old = SearchIndex.open(path)
        rows = {row for glob in globs for row in old.matching([glob]).tolist()}
        wanted = [entry for row, entry in enumerate(old.entries) if row not in rows]
        if not wanted:
            raise InputError(
                f"that would take out all {len(old.entries)} pictures; delete {path} instead"
            )
        work = _Work(path, old, Path(old.manifest.folder), None, CHUNK, silent)
        return work.bring(wanted, list(old.manifest.skipped), None)


class _Work:
    """One change of an index, under its lock."""

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

    def bring(
        self, wanted: Sequence[Entry], failed: list[Skipped], kind: IndexKind | None
    ) -> IndexChange:
        """Make the index hold `wanted`, sorted by path, without what turns out to be unreadable."""
        old = self._old
        held = {entry: row for row, entry in enumerate(old.entries)} if old else {}
        sign = Unfinished(format=INDEX_FORMAT, model=self._model, folder=str(self._folder))
        pending = Pending(self._path, sign, replaceable=old is not None)
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
                f"none of the {len(failed)} pictures can be read; the first, {failed[0].path}: "
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
        """Embed what is to do into `pending`; what cannot be read comes back."""
        failed: list[Skipped] = []
        for start in range(0, len(todo), self._chunk):
            self._progress(f"embedding {len(todo)} pictures", start, len(todo))
            entries = todo[start : start + self._chunk]
            embedded, embeddings, unreadable = self._embed_readable(entries)
            failed += unreadable
            if embedded:
                pending.add(embedded, np.concatenate(embeddings))
        return failed

    def _embed_readable(
        self, entries: Sequence[Entry]
    ) -> tuple[list[Entry], list[Floats], list[Skipped]]:
        """Embed all that can be read: which, their embeddings in parts, and which cannot."""
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
                    raise  # no image of these: what embeds them does not work
                bad, reason = error.index, error.reason
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
        places = {entry: place for place, entry in enumerate(entries)}
        kept = [(place, held[entry]) for entry, place in places.items() if entry in held]

        def fill(out: Floats) -> None:
            pending.fill({e: place for e, place in places.items() if e not in held}, out)
            for start in range(0, len(kept), _BLOCK):
                targets, rows = zip(*kept[start : start + _BLOCK], strict=True)
                assert old is not None
                out[list(targets)] = old.embeddings[list(rows)]

        self._progress(f"indexing {len(entries)} pictures ({kind})")
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
    """What is known of files before they are opened; some may be gone or closed to us."""
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


def _with_outsiders(old: SearchIndex | None, wanted: list[Entry]) -> list[Entry]:
    """`wanted` and those of the index that lie outside its folder, as far as they still exist."""
    paths = [Path(e.path) for e in old.entries if e.path.startswith("/")] if old else []
    present, _ = _entries((path for path in paths if path.exists()), Path("/nowhere"))
    return [*wanted, *present]
