"""Files of a search index, and their atomic replacement.

    photos.index/
      manifest.json             model, directory of the images, kind and recall of the index, name
                                and sha256 of each file below; files not named here are ignored
      generation-3/
        index.faiss             see `serving.search.faiss_index`
        embeddings.npy          float32 [n, dim], unit length
        paths.jsonl             path, size and modification time of each image file, one per row
      unfinished.json           model and directory of the images in `pending`
      pending/                  embeddings of an unfinished change (`serving.search.resume`)

A change writes the next generation beside the current one, then atomically replaces the manifest.
If the process is killed at any moment, the directory holds either the old index or the new one,
never a mixture. The sha256 hashes
detect damage and incomplete copies. They do not protect against an attacker who can write to the
directory.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from serving.bundles.bundle import describe_file
from serving.bundles.identity import ModelIdentity
from serving.bundles.manifest import File
from serving.errors import InputError
from serving.search.faiss_index import IndexKind, Layout, library, make
from serving.tasks.embedder import Floats
from serving.util.directories import Skipped
from serving.util.files import check_directory, disk_errors, sha256_of, sync, write_text
from serving.util.locks import locked
from serving.util.typed_json import from_json, json_text, parse_json

INDEX_FORMAT = "clip search index 1"
MANIFEST, UNFINISHED, PENDING = "manifest.json", "unfinished.json", "pending"
_LOCK = ".lock"
_GENERATION = "generation-"
_FILES = ("index.faiss", "embeddings.npy", "paths.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """State of an image file at the time it was embedded."""

    path: str
    """Relative to the index's directory of images, with `/`; absolute for files outside of it."""
    bytes: int
    mtime_ns: int
    """Modification time, in nanoseconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexManifest:
    """Contents of `manifest.json`."""

    format: str
    created: str
    """UTC, ISO 8601."""
    model: ModelIdentity
    folder: str
    """Absolute path of the directory of images."""
    count: int
    layout: Layout
    skipped: tuple[Skipped, ...]
    index: File
    embeddings: File
    paths: File

    @property
    def generation(self) -> int:
        """Number of the directory that holds the files."""
        return int(self.index.name.partition("/")[0].removeprefix(_GENERATION))

    @property
    def files(self) -> tuple[File, File, File]:
        """The files of the index."""
        return self.index, self.embeddings, self.paths


def check_model(path: Path, expected: ModelIdentity, found: ModelIdentity) -> None:
    """Check that the model in use, `found`, fits the model that `path` was built with, `expected`.

    Raises:
        InputError: the models differ, so their embeddings cannot be compared.
    """
    if not expected.fits(found):
        raise InputError(
            f"{path} was built with {expected}, but this is {found}: their embeddings cannot be "
            "compared",
            advice="use the same model, or build another index with this one",
        )


def read_manifest(path: Path) -> IndexManifest:
    """Read the manifest of the index in `path`.

    Raises:
        InputError: there is no index, or it has another format.
    """
    file = path / MANIFEST
    if not file.is_file():
        if (path / UNFINISHED).is_file():
            raise InputError(
                f"{path} holds an unfinished index",
                advice="run the same `clip-deploy search build` command again to finish it",
            )
        raise InputError(
            f"{path} is not a search index: it has no {MANIFEST}",
            advice=f"build one with `clip-deploy search build DIR --output {path}`",
        )
    try:
        document = parse_json(file.read_text(encoding="utf-8"))
        found = document.get("format") if isinstance(document, dict) else None
        if found != INDEX_FORMAT:
            raise InputError(
                f"{file}: format {found!r}, expected {INDEX_FORMAT!r}: it is not a search index, "
                "or one of another version",
                advice="build the index again in another directory",
            )
        manifest = from_json(IndexManifest, document)
        names = [f"{_GENERATION}{manifest.generation}/{name}" for name in _FILES]
        if [item.name for item in manifest.files] != names:
            raise ValueError(f"expected the files {', '.join(names)}")
        return manifest
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: {error}", advice=_repair(path)) from error


def verify(path: Path, file: File, manifest: IndexManifest) -> None:
    """Compare the sha256 of a file with the manifest.

    Raises:
        InputError: the file is missing or damaged.
    """
    whole = path / file.name
    if not whole.is_file():
        raise InputError(f"{whole} is missing", advice=_repair(path, manifest))
    if (found := sha256_of(whole)) != file.sha256:
        raise InputError(
            f"{whole} is damaged: {whole.stat().st_size} bytes with sha256 {found[:16]}..., "
            f"expected {file.bytes} bytes with {file.sha256[:16]}... by {MANIFEST}",
            advice=_repair(path, manifest),
        )


def _repair(path: Path, manifest: IndexManifest | None = None) -> str:
    folder = manifest.folder if manifest else "DIR"
    return (
        f"restore {path} from a copy, or delete it and build it again: "
        f"`clip-deploy search build {folder} --output {path}`"
    )


@contextmanager
def index_locked(path: Path) -> Iterator[None]:
    """Create the directory `path` if needed, and lock it for one writer.

    The lock is released at the end of the block or of the process.

    Raises:
        InputError: `path` contains files that are not an index, cannot be written, or is locked by
            another process.
        StorageError: the disk became full within the block.
    """
    check_directory(path)
    if (path / MANIFEST).exists():
        read_manifest(path)
    elif path.is_dir() and not (path / UNFINISHED).exists():
        others = {item.name for item in path.iterdir()} - {_LOCK, f".{UNFINISHED}.tmp"}
        if others:
            raise InputError(
                f"{path} holds other files, such as {min(others)}, which are left unchanged",
                advice="give another directory for the index",
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path / _LOCK))
        except BlockingIOError as error:
            raise InputError(
                f"another process is changing {path}", advice="wait until it has finished"
            ) from error
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from error
        with disk_errors(path):
            yield


def commit(
    path: Path,
    old: IndexManifest | None,
    *,
    model: ModelIdentity,
    folder: Path,
    kind: IndexKind,
    entries: Sequence[Entry],
    skipped: Sequence[Skipped],
    fill: Callable[[Floats], None],
) -> IndexManifest:
    """Write the next generation and make it the current one.

    Call it within `index_locked`. While it runs, FAISS holds all embeddings in memory.

    Args:
        path: directory of the index.
        old: manifest of the current generation, if there is one.
        model: model of the embeddings.
        folder: directory of the images.
        kind: kind of the index.
        entries: the embedded files, in the order of the rows of the index.
        skipped: files that could not be embedded.
        fill: writes the embeddings to an array, float32 [n, dim].
    """
    generation = path / f"{_GENERATION}{old.generation + 1 if old else 1}"
    _remove_generations(path, old)
    files = [generation / name for name in _FILES]
    try:
        generation.mkdir()
        embeddings = _created(files[1], (len(entries), model.embed_dim))
        fill(embeddings)
        embeddings.flush()
        lines = (json_text(entry) + "\n" for entry in entries)
        with files[2].open("w", encoding="utf-8") as file:
            file.writelines(lines)
        index, layout = make(kind, embeddings)
        with files[0].open("wb") as out:  # FAISS itself ignores errors when it closes a file
            library().write_index(index, library().PyCallbackIOWriter(out.write))
        sync(generation)
        manifest = IndexManifest(
            format=INDEX_FORMAT,
            created=_now(),
            model=model,
            folder=str(folder),
            count=len(entries),
            layout=layout,
            skipped=tuple(skipped),
            index=describe_file(files[0], path),
            embeddings=describe_file(files[1], path),
            paths=describe_file(files[2], path),
        )
        _publish(path, manifest)
    except Exception:  # on a full disk, the incomplete generation takes up space
        _remove_generations(path, read_manifest(path) if (path / MANIFEST).exists() else None)
        raise
    _remove_generations(path, manifest)
    return manifest


def _created(file: Path, shape: tuple[int, int]) -> np.memmap[Any, np.dtype[np.float32]]:
    """Create a float32 .npy file with its disk space allocated, memory-mapped for writing.

    Without the allocation, a disk that becomes full would kill the process with SIGBUS.
    """
    embeddings = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        file, "w+", np.float32, shape
    )
    with file.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    created: np.memmap[Any, np.dtype[np.float32]] = embeddings
    return created


def amend(
    path: Path, manifest: IndexManifest, folder: Path, skipped: Sequence[Skipped]
) -> IndexManifest:
    """Update `folder` and `skipped` in the manifest, and return the updated manifest.

    The generation does not change. Call it within `index_locked`.
    """
    _remove_generations(path, manifest)
    changed = replace(manifest, folder=str(folder), skipped=tuple(skipped))
    if changed != manifest:
        changed = replace(changed, created=_now())
        _publish(path, changed)
    return changed


def _publish(path: Path, manifest: IndexManifest) -> None:
    write_text(path / MANIFEST, json_text(manifest, indent=2) + "\n")


def _remove_generations(path: Path, kept: IndexManifest | None) -> None:
    """Delete all generations, including unfinished ones, except that of the manifest `kept`."""
    name = f"{_GENERATION}{kept.generation}" if kept else ""
    for generation in path.glob(f"{_GENERATION}*"):
        if generation.name != name:
            shutil.rmtree(generation)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
