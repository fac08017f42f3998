"""Embeddings of a change of an index that is not finished: chunk files, each there whole or not.

Whose they are stands in `unfinished.json` beside their folder `pending`.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from serving.bundles.identity import ModelIdentity
from serving.errors import InputError
from serving.search.storage import INDEX_FORMAT, PENDING, UNFINISHED, Entry, check_model
from serving.tasks.embedder import Floats
from serving.util.files import write_bytes, write_text
from serving.util.typed_json import from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """`unfinished.json`."""

    format: str
    model: ModelIdentity
    folder: str
    """Of the pictures."""


class Pending:
    """The finished chunks of an unfinished change. To be used in `storage.index_locked`.

    Args:
        path: the index's folder.
        sign: whose embeddings are wanted.
        replaceable: chunks of another model or folder may be dropped, because `path` holds a
            finished index beside them.

    Raises:
        InputError: there are chunks of another model or folder, and nothing else.
    """

    def __init__(self, path: Path, sign: Unfinished, *, replaceable: bool) -> None:
        self._path, self._sign = path, sign
        self._rows: dict[Entry, tuple[Path, int]] = {}
        found = self._read_sign()
        if found is None or (replaceable and found != sign):
            self.drop()
            return
        check_model(path, found.model, sign.model)
        if found.folder != sign.folder:
            raise InputError(
                f"{path} is the beginning of an index of {found.folder}, not of {sign.folder}; "
                "finish that, delete it, or give another folder for the index"
            )
        for file in sorted((path / PENDING).glob("*.npz")):
            try:
                entries, _ = _read(file)
            except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
                file.unlink()  # cut short by a full disk or a power cut: embedded again
                continue
            self._rows |= {entry: (file, row) for row, entry in enumerate(entries)}

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._rows

    def _read_sign(self) -> Unfinished | None:
        """What `unfinished.json` says; None where there is none of ours."""
        try:
            document = json.loads((self._path / UNFINISHED).read_text(encoding="utf-8"))
            found = from_json(Unfinished, document)
        except (OSError, ValueError):
            return None
        return found if found.format == INDEX_FORMAT else None

    def add(self, entries: Sequence[Entry], embeddings: Floats) -> None:
        """Keep a chunk: float32 [entries, dim]."""
        folder = self._path / PENDING
        if not folder.exists():
            write_text(self._path / UNFINISHED, json.dumps(asdict(self._sign)) + "\n")
            folder.mkdir()
        numbers = [int(file.stem) for file in folder.glob("*.npz")]
        file = folder / f"{max(numbers, default=0) + 1:06d}.npz"
        text = json.dumps([asdict(entry) for entry in entries]).encode()
        buffer = io.BytesIO()
        np.savez(buffer, embeddings=embeddings, entries=np.frombuffer(text, np.uint8))
        write_bytes(file, buffer.getvalue())
        self._rows |= {entry: (file, row) for row, entry in enumerate(entries)}

    def fill(self, places: Mapping[Entry, int], out: Floats) -> None:
        """Write the embeddings of those of `places` that are here to their rows of `out`."""
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for entry, place in places.items():
            if entry in self._rows:
                file, row = self._rows[entry]
                by_file.setdefault(file, []).append((place, row))
        for file, pairs in by_file.items():
            _, embeddings = _read(file)
            targets, rows = zip(*pairs, strict=True)
            out[list(targets)] = embeddings[list(rows)]

    def drop(self) -> None:
        """Delete all chunks."""
        self._rows.clear()
        shutil.rmtree(self._path / PENDING, ignore_errors=True)
        (self._path / UNFINISHED).unlink(missing_ok=True)


def _read(file: Path) -> tuple[list[Entry], Floats]:
    # Opened here: np.load leaves a file open that it finds to be no archive.
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as chunk:
        entries = [Entry(**fields) for fields in json.loads(chunk["entries"].tobytes())]
        return entries, chunk["embeddings"]
