"""A folder that holds a search index: its layout, and how it is replaced whole.

    photos.index/
      manifest.json             the model, the pictures' folder, the index's kind and recall, name
                                and sha256 of each file below; what it does not name is ignored
      generation-3/
        index.faiss             see `serving.search.faiss_index`
        embeddings.npy          float32 [n, dim], unit length
        paths.jsonl             row by row the path, size and time of each picture's file
      unfinished.json           whose embeddings, and of which folder, lie in
      pending/                  embeddings of a change that is not finished (`serving.search.build`)

A change writes the next generation beside the present one, then renames a new manifest over the old
one: whenever it is killed, the index is the old one or the new one. The sha256 are there against
damage and half a copy; they are no protection against someone who may write to the folder.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
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
from serving.util.files import disk_errors, sha256_of, sync, write_text
from serving.util.locks import locked
from serving.util.typed_json import from_json

INDEX_FORMAT = "clip search index 1"
MANIFEST, UNFINISHED, PENDING = "manifest.json", "unfinished.json", "pending"
_LOCK = ".lock"
_GENERATION = "generation-"
_FILES = ("index.faiss", "embeddings.npy", "paths.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A picture's file when it was embedded."""

    path: str
    """With `/`, below the index's folder of pictures; absolute for one from elsewhere."""
    bytes: int
    mtime_ns: int
    """Time of its last change, nanoseconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A file that could not be embedded."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexManifest:
    """Everything about an index but its contents."""

    format: str
    created: str
    """UTC, ISO 8601."""
    model: ModelIdentity
    folder: str
    """Of the pictures, absolute."""
    count: int
    layout: Layout
    skipped: tuple[Skipped, ...]
    index: File
    embeddings: File
    paths: File

    @property
    def generation(self) -> int:
        """Number of the folder that its files are in."""
        return int(self.index.name.partition("/")[0].removeprefix(_GENERATION))

    @property
    def files(self) -> tuple[File, File, File]:
        """All that the manifest vouches for."""
        return self.index, self.embeddings, self.paths


def check_model(path: Path, expected: ModelIdentity, found: ModelIdentity) -> None:
    """Refuse another model than the one that the index in `path` was made with."""
    if not expected.fits(found):
        raise InputError(
            f"{path} was made with {expected}, this is {found}: their embeddings cannot be "
            "compared; use that model, or build another index with this one"
        )


def read_manifest(path: Path) -> IndexManifest:
    """The manifest of the index in `path`.

    Raises:
        InputError: there is no index, or one of another format.
    """
    file = path / MANIFEST
    if not file.is_file():
        if (path / UNFINISHED).is_file():
            raise InputError(
                f"{path} is the beginning of an index; the `clip-deploy search build` that made it "
                "goes on when it is called again"
            )
        raise InputError(
            f"{path} is no search index: no {MANIFEST} in it; make one with "
            f"`clip-deploy search build DIR --output {path}`"
        )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        found = document.get("format") if isinstance(document, dict) else None
        if found != INDEX_FORMAT:
            raise InputError(
                f"{file}: format {found!r}, expected {INDEX_FORMAT!r}; it is no search index, or "
                "one of another version, which must be built again elsewhere"
            )
        manifest = from_json(IndexManifest, document)
        names = [f"{_GENERATION}{manifest.generation}/{name}" for name in _FILES]
        if [item.name for item in manifest.files] != names:
            raise ValueError(f"expected the files {', '.join(names)}")
        return manifest
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: {error}; {_remedy(path)}") from error


def verify(path: Path, file: File, manifest: IndexManifest) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        InputError: it is missing or damaged.
    """
    whole = path / file.name
    if not whole.is_file():
        raise InputError(f"{whole} is missing; {_remedy(path, manifest)}")
    if (found := sha256_of(whole)) != file.sha256:
        raise InputError(
            f"{whole} is damaged: {whole.stat().st_size} bytes with sha256 {found[:16]}..., "
            f"{MANIFEST} says {file.bytes} bytes with {file.sha256[:16]}...; "
            f"{_remedy(path, manifest)}"
        )


def _remedy(path: Path, manifest: IndexManifest | None = None) -> str:
    folder = manifest.folder if manifest else "DIR"
    return (
        f"restore {path} from a copy, or delete it and build it again: "
        f"`clip-deploy search build {folder} --output {path}`"
    )


@contextmanager
def index_locked(path: Path) -> Iterator[None]:
    """The folder `path`, made if need be, for one writer at a time; freed when the process ends.

    Raises:
        InputError: it holds something else than an index, or another process is at it.
        StorageError: the disk became full in the block.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; expected the name of a folder for the index")
    if (path / MANIFEST).exists():
        read_manifest(path)
    elif path.is_dir() and not (path / UNFINISHED).exists():
        others = {item.name for item in path.iterdir()} - {_LOCK, f".{UNFINISHED}.tmp"}
        if others:
            raise InputError(
                f"{path} holds other things, such as {min(others)}, which are left alone; "
                "give another folder for the index"
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
                f"another process changes {path} at the moment; wait until it is done"
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
    """Write the next generation and make it the index; `fill` writes its embeddings [n, dim].

    To be called in `index_locked`. Memory: what FAISS keeps, which is all embeddings.
    """
    generation = path / f"{_GENERATION}{old.generation + 1 if old else 1}"
    _remove_generations(path, old)
    files = [generation / name for name in _FILES]
    try:
        generation.mkdir()
        embeddings = _created(files[1], (len(entries), model.embed_dim))
        fill(embeddings)
        embeddings.flush()
        lines = (json.dumps(asdict(entry)) + "\n" for entry in entries)
        with files[2].open("w", encoding="utf-8") as file:
            file.writelines(lines)
        index, layout = make(kind, embeddings)
        with files[0].open("wb") as out:  # FAISS itself does not tell of an error on closing
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
    except Exception:  # such as a full disk, of which this is a part
        _remove_generations(path, read_manifest(path) if (path / MANIFEST).exists() else None)
        raise
    _remove_generations(path, manifest)
    return manifest


def _created(file: Path, shape: tuple[int, int]) -> np.memmap[Any, np.dtype[np.float32]]:
    """A new .npy of float32, mapped for writing, with its space on the disk.

    Else the disk could become full while a page is written, of which a process dies (SIGBUS).
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
    """Change what the manifest says beside the generation, where anything is to change.

    To be called in `index_locked`.
    """
    _remove_generations(path, manifest)
    changed = replace(manifest, folder=str(folder), skipped=tuple(skipped))
    if changed != manifest:
        changed = replace(changed, created=_now())
        _publish(path, changed)
    return changed


def _publish(path: Path, manifest: IndexManifest) -> None:
    write_text(path / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def _remove_generations(path: Path, kept: IndexManifest | None) -> None:
    """All but the one that `kept` names: those that gave way, and those never finished."""
    name = f"{_GENERATION}{kept.generation}" if kept else ""
    for generation in path.glob(f"{_GENERATION}*"):
        if generation.name != name:
            shutil.rmtree(generation)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
