"""What a bulk job reads: pictures in folders, Parquet files or WebDataset tars, cut into shards.

Ray Data's own readers are not used: one unreadable file ends their job (or, told to go on, they
drop the whole block it is in), and the order of their rows differs from run to run, so that a
restarted job could not know what is done.

Does not know: Ray, or what becomes of the rows (`bulk_worker`).
"""

import glob
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias

from serving.bulk.parquet import read_rows, row_group_runs, survey
from serving.errors import InputError
from serving.inputs.decode import too_large
from serving.limits import MAX_PICTURE_BYTES
from serving.util.directories import SUFFIXES, walk

SourceKind = Literal["pictures", "parquet", "webdataset"]
Row: TypeAlias = tuple[str, Path | bytes | InputError]
"""A name, and the picture: its file, its encoded bytes, or why it cannot be had."""

_KINDS: dict[str, SourceKind] = {
    **dict.fromkeys(SUFFIXES, "pictures"),
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_CALLED = {"pictures": "pictures", "parquet": "Parquet files", "webdataset": "tars"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where pictures come from."""

    location: str
    """Absolute path of a folder or file, or a pattern of paths."""
    kind: SourceKind
    image_column: str | None = None
    """Of Parquet: holds encoded pictures, or structs of `bytes` and `path`."""
    path_column: str | None = None
    """Of Parquet: names the rows."""

    @property
    def root(self) -> Path:
        """What the names of rows are relative to."""
        return _root(self.location)

    @property
    def recursive(self) -> bool:
        """Whether files at any depth below `root` belong to it."""
        return Path(self.location).is_dir() or "**" in self.location


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What becomes one file of the output."""

    files: tuple[str, ...]
    """Relative to the source's root: pictures, or the one Parquet file or tar."""
    row_groups: tuple[int, int] | None = None
    """First and one past the last, of the Parquet file; None: all."""


def find_source(
    source: str, image_column: str | None = None, path_column: str | None = None
) -> tuple[Source, int]:
    """Look at `source`: a folder (searched recursively), a file, or a pattern such as `a/**/*.tar`.

    Returns:
        The source, and how many rows it has; tars are counted as one, since only reading them
        would tell.

    Raises:
        InputError: there is nothing, or nothing of a kind that can be read, or more than one kind.
    """
    location = os.path.abspath(source)  # noqa: PTH100  a pattern is no path
    found = Counter(_kind(name) for name in _files(location))
    kinds = [kind for kind in found if kind is not None]
    if not kinds:
        there = Path(source).exists()
        raise InputError(
            f"{source}: {'nothing to embed' if there else 'no such file or folder'}; expected a "
            f"folder of pictures ({', '.join(SUFFIXES)}), of Parquet files (.parquet) or of "
            "WebDataset tars (.tar), one such file, or a pattern such as 'data/**/*.tar'"
        )
    if len(kinds) > 1:
        held = " and ".join(f"{found[kind]} {_CALLED[kind]}" for kind in sorted(kinds))
        raise InputError(
            f"{source} holds {held}; say which are meant by a pattern in quotes, such as "
            f"'{source.rstrip('/')}/**/*.jpg' or '{source.rstrip('/')}/**/*.parquet'"
        )
    kind = kinds[0]
    if kind != "parquet":
        if image_column or path_column:
            raise InputError(f"{source} holds {_CALLED[kind]}, which have no columns")
        return Source(location=location, kind=kind), found[kind]
    paths = (_root(location) / name for name in _files(location) if _kind(name) == kind)
    image, rows = survey(paths, image_column, path_column)
    if not rows:
        raise InputError(f"{source}: its Parquet files have no rows")
    parquet = Source(location=location, kind=kind, image_column=image, path_column=path_column)
    return parquet, rows


def shards_of(source: Source, size: int) -> Iterator[Shard]:
    """Cut `source` into shards of at most `size` rows, the same way every time.

    A Parquet file is cut between row groups only, so one that is larger makes a larger shard; a tar
    is not cut at all.

    Raises:
        InputError: a folder cannot be listed.
    """
    names = (name for name in _files(source.location) if _kind(name) == source.kind)
    if source.kind == "pictures":
        held: list[str] = []
        for name in names:
            held.append(name)
            if len(held) == size:
                yield Shard(files=tuple(held))
                held.clear()
        if held:
            yield Shard(files=tuple(held))
    elif source.kind == "webdataset":
        yield from (Shard(files=(name,)) for name in names)
    else:
        for name in names:
            runs = row_group_runs(source.root / name, size)
            # Unreadable: a shard of one row with the reason.
            yield from (Shard(files=(name,), row_groups=run) for run in runs or (None,))


def read_shard(source: Source, shard: Shard) -> Iterator[Row]:
    """The rows of a shard; what cannot be read is a row with the reason."""
    if source.kind == "pictures":
        return ((printable(name), source.root / name) for name in shard.files)
    (name,) = shard.files
    if source.kind == "webdataset":
        return _tar_rows(source.root / name, printable(name))
    assert source.image_column is not None
    return read_rows(
        source.root / name,
        printable(name),
        source.image_column,
        source.path_column,
        shard.row_groups,
    )


def printable(name: str) -> str:
    """A file name that is not UTF-8 on disk, as text that is: its odd bytes become `\\udcxx`."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _kind(name: str) -> SourceKind | None:
    return _KINDS.get(PurePath(name).suffix.lower())


def _root(location: str) -> Path:
    path = Path(location)
    if path.is_dir():
        return path
    if path.exists():
        return path.parent
    plain = list(path.parent.parts)
    fixed = next((i for i, part in enumerate(plain) if glob.has_magic(part)), len(plain))
    return Path(*plain[:fixed])


def _files(location: str) -> Iterator[str]:
    """Names relative to the root, in an order that depends on nothing but the names.

    Of a folder, the names of one directory at a time are in memory; of a pattern all that match.
    """
    path, root = Path(location), _root(location)
    if path.is_dir():
        return walk(path)
    if path.exists():
        return iter([path.name])
    matches = sorted(glob.glob(location, recursive=True))  # noqa: PTH207  pathlib's is relative
    return (os.path.relpath(match, root) for match in matches if Path(match).is_file())


# ---------------------------------------------------------------- WebDataset


def _tar_rows(path: Path, name: str) -> Iterator[Row]:
    found = 0
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # they would pile up
                if not member.isfile() or _kind(member.name) != "pictures":
                    continue
                picture = _member(tar, member)
                found += 1
                yield f"{name}/{printable(member.name)}", picture
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        yield (
            name,
            InputError(
                f"the tar is cut off or damaged after {found} pictures ({error}); copy or download "
                "it again"
            ),
        )
        return
    if not found:
        yield name, InputError(f"no pictures in this tar; expected members {', '.join(SUFFIXES)}")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | InputError:
    """A picture, or, before it is read, that it is too large."""
    if member.size > MAX_PICTURE_BYTES:
        return InputError(too_large(member.size))
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _check_end(tar: tarfile.TarFile) -> None:
    """`tarfile` takes a damaged header, or none, for the end; an archive ends with zeros."""
    file: Any = tar.fileobj
    file.seek(tar.offset)
    if (end := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("damaged header" if end else "no end-of-archive mark")
