"""Embeddings of an unfinished change of an index.

They are stored in the directory `pending` as chunk files, which are written atomically.
`unfinished.json` beside it records their model and the directory of images.
"""

import io
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.bundles.identity import ModelIdentity
from serving.errors import InputError
from serving.search.storage import INDEX_FORMAT, PENDING, UNFINISHED, Entry, check_model
from serving.tasks.embedder import Floats
from serving.util.files import write_bytes, write_text
from serving.util.typed_json import from_json, json_text, parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """Contents of `unfinished.json`."""

    format: str
    model: ModelIdentity
    folder: str
    """Directory of the images."""


class Pending:
    """Finished chunks of an unfinished change. Use it within `storage.index_locked`.

    Args:
        path: directory of the index.
        owner: model and directory of the images that are to be embedded.
        replaceable: chunks of another owner may be deleted, because `path` also holds a finished
            index.

    Raises:
        InputError: there are chunks of another owner that may not be deleted.
    """

    def __init__(self, path: Path, owner: Unfinished, *, replaceable: bool) -> None:
        self._path, self._owner = path, owner
        self._rows: dict[Entry, tuple[Path, int]] = {}
        found = self._read_owner()
        if found is None or (replaceable and found != owner):
            self.drop()
            return
        check_model(path, found.model, owner.model)
        if found.folder != owner.folder:
            raise InputError(
                f"{path} holds an unfinished index of {found.folder}, not of {owner.folder}",
                advice="finish or delete it, or give another directory for the index",
            )
        for file in sorted((path / PENDING).glob("*.npz")):
            try:
                entries, _ = _read(file)
            except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
                file.unlink()  # truncated by a full disk or a power failure: embed them again
                continue
            self._rows |= {entry: (file, row) for row, entry in enumerate(entries)}

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._rows

    def _read_owner(self) -> Unfinished | None:
        """Read `unfinished.json`; return None if it does not exist or is not valid."""
        try:
            document = parse_json((self._path / UNFINISHED).read_text(encoding="utf-8"))
            found = from_json(Unfinished, document)
        except (OSError, ValueError):
            return None
        return found if found.format == INDEX_FORMAT else None

    def add(self, entries: Sequence[Entry], embeddings: Floats) -> None:
        """Write a chunk of embeddings, float32 [entries, dim]."""
        directory = self._path / PENDING
        if not directory.exists():
            write_text(self._path / UNFINISHED, json_text(self._owner) + "\n")
            directory.mkdir()
        numbers = [int(file.stem) for file in directory.glob("*.npz")]
        file = directory / f"{max(numbers, default=0) + 1:06d}.npz"
        text = json_text(entries).encode()
        buffer = io.BytesIO()
        np.savez(buffer, embeddings=embeddings, entries=np.frombuffer(text, np.uint8))
        write_bytes(file, buffer.getvalue())
        self._rows |= {entry: (file, row) for row, entry in enumerate(entries)}

    def fill(self, targets: Mapping[Entry, int], out: Floats) -> None:
        """Copy the pending embeddings of the entries in `targets` to these rows of `out`."""
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for entry, target in targets.items():
            if entry in self._rows:
                file, row = self._rows[entry]
                by_file.setdefault(file, []).append((target, row))
        for file, pairs in by_file.items():
            _, embeddings = _read(file)
            out_rows, rows = zip(*pairs, strict=True)
            out[list(out_rows)] = embeddings[list(rows)]

    def drop(self) -> None:
        """Delete all chunks."""
        self._rows.clear()
        shutil.rmtree(self._path / PENDING, ignore_errors=True)
        (self._path / UNFINISHED).unlink(missing_ok=True)


def _read(file: Path) -> tuple[list[Entry], Floats]:
    # np.load does not close a file that it opened itself and that is not an archive.
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as chunk:
        entries = [Entry(**fields) for fields in parse_json(chunk["entries"].tobytes())]
        return entries, chunk["embeddings"]
