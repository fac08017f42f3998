"""Atomic writes: files and directories are written under a temporary name, flushed and renamed.

The flush precedes the rename because a file system may store the new name before the data. Without
it, a power failure could replace a good old file by an empty one.
"""

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from serving.errors import ClipDeployError, InputError, StorageError
from serving.util.locks import locked

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of an exhausted disk quota."""
_LEAST_FREE = 1 << 16
"""Amount of free space, in bytes, below which an error of unknown cause is attributed to a full
disk."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def new_directory(target: Path, sign: str) -> Iterator[Path]:
    """Yield a new directory that atomically replaces `target` if the block ends without an error.

    Until then an existing `target` is unchanged; after the exchange the old directory is deleted. A
    directory is replaced only if it is empty or contains the path `sign`, which identifies
    directories written by this project. If the file system has no atomic exchange, two renames
    replace it: a process killed between them leaves no `target`, and the next call restores the old
    one. Each call also removes the temporary directories of killed calls.

    Raises:
        InputError: `target` is a file, or a directory that must not be replaced.
        StorageError: the disk is full.
    """
    with ExitStack() as stack, disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        _check_replaceable(target, sign)
        scratch = _scratch(target, stack)
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        new = scratch / "new"
        new.mkdir()
        yield new
        sync(new)
        if not target.exists():
            new.rename(target)
        elif not _exchange(new, target):
            target.rename(scratch / "old")
            new.rename(target)
        _sync_one(target.parent)


def _check_replaceable(target: Path, sign: str) -> None:
    if not target.exists() or (target / sign).exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file", advice="give the path of a directory to write")
    if any(target.iterdir()):
        raise InputError(
            f"{target} holds other files (no {sign}), which would be deleted to write here",
            advice="give another directory, or empty this one",
        )


def _scratch(target: Path, stack: ExitStack) -> Path:
    """Return a new directory beside `target`, locked until `stack` is closed."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            stack.enter_context(locked(scratch))
        except (FileNotFoundError, BlockingIOError):  # removed by another process before the lock
            continue
        except OSError:  # no locks on directories, as on NFS: use it unlocked; no sweep removes it
            return scratch
        if scratch.exists():
            return scratch


def _sweep(target: Path) -> None:
    """Remove scratch directories of killed `new_directory(target)` calls; live ones are locked."""
    # mkdtemp appends eight characters.
    for scratch in target.parent.glob(f".{glob.escape(target.name)}.????????"):
        if scratch.is_symlink() or not scratch.is_dir():
            continue
        with suppress(OSError), locked(scratch):
            inside = {item.name for item in scratch.iterdir()}
            if inside - {"new", "old"}:
                continue
            if "old" in inside and not target.exists():
                (scratch / "old").rename(target)
            shutil.rmtree(scratch, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths atomically; return False if the system does not support that."""
    renameat2 = getattr(_LIBC, "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: at any time the file has its old or its new content.

    Raises:
        StorageError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            temporary.write_bytes(data)
            _sync_one(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_one(path.parent)


def sync(directory: Path) -> None:
    """Flush a directory and everything below it to the disk."""
    for path in (*directory.rglob("*"), directory):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush directories
            raise
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise `StorageError` in place of any error that a full disk causes while `path` is written.

    Raises:
        StorageError: the disk is full.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        directory = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(directory).free
        unexplained = free < _LEAST_FREE and not isinstance(error, ClipDeployError)
        if not (_says_full(error) or unexplained):
            raise
        raise StorageError(
            f"{path} cannot be written: no space is left on the disk of {directory} ({free:,} "
            f"bytes free): {error}. Existing files are unchanged",
            advice="free some space, or write elsewhere",
        ) from error


def _says_full(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes reports a full disk.

    Libraries such as pyarrow raise their own types with the system's message as text.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(os.strerror(code) in str(error) for code in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` as a hard link to `source`, or as a copy if links are not possible."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copy2(source, target)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
