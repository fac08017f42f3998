"""Sources of a bulk job: directories of images, Parquet files or WebDataset tars, as shards.

Ray Data's own readers are not used. One unreadable file ends their job, or drops its whole block if
errors are ignored. The order of their rows differs between runs, so a restarted job could not tell
which rows are done.

This module does not know Ray, or how the rows are processed (`serving.bulk.worker`).
"""

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
from serving.limits import MAX_IMAGE_BYTES
from serving.util.directories import (
    LINKED_DIRECTORIES,
    SUFFIXES,
    Item,
    Pattern,
    described,
    is_directory,
    problem_of,
    walk,
)

SourceKind = Literal["pictures", "parquet", "webdataset"]
Row: TypeAlias = tuple[str, Path | bytes | InputError]
"""Name of an image, and its file, its encoded bytes, or the error why it cannot be read."""

_KINDS: dict[str, SourceKind] = {
    **dict.fromkeys(SUFFIXES, "pictures"),
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_KIND_NAMES = {"pictures": "images", "parquet": "Parquet files", "webdataset": "tars"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Location of the images of a job, and how to read them."""

    location: str
    """Absolute path of a directory or file, or a pattern of paths. A path that exists is taken
    literally, even if it has characters such as `[`."""
    kind: SourceKind
    image_column: str | None = None
    """Parquet column of encoded images, or of structs of `bytes` and `path`."""
    path_column: str | None = None
    """Parquet column that names the rows."""

    @property
    def root(self) -> Path:
        """Directory that names of rows are relative to."""
        return _root(self.location)

    @property
    def recursive(self) -> bool:
        """True if files at any depth below `root` belong to the source."""
        return is_directory(self.location) or Pattern(self.location).recursive


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Part of a source that becomes one file of the output."""

    files: tuple[str, ...]
    """Images, or a single Parquet file or tar, relative to the root of the source."""
    row_groups: tuple[int, int] | None = None
    """First row group of the Parquet file, and one past the last. None: all."""


def find_source(
    source: str, image_column: str | None = None, path_column: str | None = None
) -> tuple[Source, int, Counter[str]]:
    """Find the images of `source`.

    Args:
        source: a directory, which is searched recursively, a file, or a pattern such as
            `a/**/*.tar`.
        image_column: Parquet column of the images. Default: `image` or `bytes`.
        path_column: Parquet column that names the rows.

    Returns:
        The source, its number of rows, and what else is there. A tar counts as one row, because its
        number of images is unknown until it is read.

    Raises:
        InputError: the source does not exist, has no files of a readable kind, or has files of
            several kinds.
    """
    location = os.path.abspath(source)  # noqa: PTH100  a pattern is no path
    found: Counter[SourceKind] = Counter()
    ignored: Counter[str] = Counter()
    for item in _items(location):
        if item.kind == "linked directory":
            ignored[LINKED_DIRECTORIES] += 1
        elif (kind := _kind(item.name)) is not None and item.kind == "file":
            found[kind] += 1
        elif not item.problem:
            ignored[PurePath(item.name).suffix.lower()] += 1
    if not found:
        there = os.path.lexists(source)
        others = f"; ignored {described(ignored)}" if ignored else ""
        raise InputError(
            f"{source}: {'nothing to embed' if there else 'no such file or directory'}; expected a "
            f"directory of images ({', '.join(SUFFIXES)}), of Parquet files (.parquet) or of "
            f"WebDataset tars (.tar), one such file, or a pattern such as 'data/**/*.tar'{others}"
        )
    if len(found) > 1:
        held = " and ".join(f"{found[kind]} {_KIND_NAMES[kind]}" for kind in sorted(found))
        raise InputError(
            f"{source} holds {held}, expected one kind of files",
            advice="choose with a quoted pattern, such as "
            f"'{source.rstrip('/')}/**/*.jpg' or '{source.rstrip('/')}/**/*.parquet'",
        )
    (kind,) = found
    if kind != "parquet":
        if image_column or path_column:
            raise InputError(
                f"{source} holds {_KIND_NAMES[kind]}, which have no columns",
                advice="leave out --image-column and --path-column",
            )
        return Source(location=location, kind=kind), found[kind], ignored
    root = _root(location)
    items = (item for item in _items(location) if _kind(item.name) == kind and not item.problem)
    image, rows = survey((root / item.name for item in items), image_column, path_column)
    if not rows:
        raise InputError(f"{source}: its Parquet files have no rows")
    parquet = Source(location=location, kind=kind, image_column=image, path_column=path_column)
    return parquet, rows, ignored


def shards_of(source: Source, size: int) -> Iterator[Shard]:
    """Divide `source` into shards of at most `size` rows, deterministically.

    A Parquet file is divided only between row groups, so a larger row group becomes a larger shard.
    A tar is always one shard. What cannot be read, such as a broken link or a directory that cannot
    be listed, becomes a row with an error.

    Raises:
        InputError: the root of the source cannot be listed.
    """
    names = (
        item.name
        for item in _items(source.location)
        if _kind(item.name) == source.kind or item.kind == "directory"
    )
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
            whole = source.root / name
            runs = None if problem_of(whole) else row_group_runs(whole, size)
            # An unreadable file becomes a shard of one row, which holds the error.
            yield from (Shard(files=(name,), row_groups=run) for run in runs or (None,))


def read_shard(source: Source, shard: Shard) -> Iterator[Row]:
    """Return the rows of a shard; rows that cannot be read hold an error."""
    if source.kind == "pictures":
        root = source.root
        return ((printable(name), _checked(root / name)) for name in shard.files)
    (name,) = shard.files
    if isinstance(checked := _checked(source.root / name), InputError):
        return iter([(printable(name), checked)])
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
    """Return a file name as valid UTF-8; bytes that are not UTF-8 become `\\udcxx`."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _kind(name: str) -> SourceKind | None:
    return _KINDS.get(PurePath(name).suffix.lower())


def _checked(path: Path) -> Path | InputError:
    """Return `path`, or an error if it is not a file that can be read. Pipes are not opened."""
    if is_directory(path):
        return InputError("the directory cannot be listed")
    problem = problem_of(path)
    return InputError(problem) if problem else path


def _root(location: str) -> Path:
    path = Path(location)
    if is_directory(path):
        return path
    return path.parent if os.path.lexists(path) else Pattern(location).root


def _items(location: str) -> Iterator[Item]:
    """Yield what is found below the root, in an order that depends only on the names.

    Only the names of one directory per level are in memory.

    Raises:
        InputError: the root cannot be listed, or the location is a file that cannot be read.
    """
    path = Path(location)
    if is_directory(path):
        return walk(path)
    if not os.path.lexists(path):
        return Pattern(location).walk()
    if problem := problem_of(path):
        raise InputError(f"{path} {problem}", advice="give a file or a directory")
    return iter([Item(path.name)])


# ---------------------------------------------------------------- WebDataset


def _tar_rows(path: Path, name: str) -> Iterator[Row]:
    found = 0
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # bounds memory: tarfile keeps every member
                if not member.isfile() or _kind(member.name) != "pictures":
                    continue
                image = _member(tar, member)
                found += 1
                yield f"{name}/{printable(member.name)}", image
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        yield (
            name,
            InputError(
                f"the tar is truncated or damaged after {found} images ({error}); copy or download "
                "it again"
            ),
        )
        return
    if not found:
        yield name, InputError(f"no images in this tar; expected members {', '.join(SUFFIXES)}")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | InputError:
    """Read an image; return an error without reading it if it is too large."""
    if member.size > MAX_IMAGE_BYTES:
        return InputError(too_large(member.size))
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _check_end(tar: tarfile.TarFile) -> None:
    """Check that the archive ends with zeros: `tarfile` ends silently at a damaged header."""
    file: Any = tar.fileobj
    file.seek(tar.offset)
    if (end := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("damaged header" if end else "no end-of-archive marker")
