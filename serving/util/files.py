"""Files that are never half there: written under a temporary name, flushed to the disk, renamed.

Flushed before they are renamed, because a file system may write the new name down before the data:
after a power cut, an old file that was good would have given way to an empty one.
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
"""What the system says of a full disk, or of a full share of one."""
_LEAST_FREE = 1 << 16
"""Bytes; with less than that, an error that names no cause is taken for one of a full disk."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def new_directory(target: Path, sign: str) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends without an error.

    What was at `target` stays whole until then, and is deleted after it gave way. That is done only
    to a directory that holds `sign`, a path by which one of ours is known, or nothing at all. Old
    and new change places in one step; on a file system that cannot do that, a kill just then leaves
    `target` missing, and the next call puts the old one back. What killed calls left is removed.

    Raises:
        InputError: something else is at `target`.
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
        raise InputError(f"{target} is a file; expected the name of a directory to write")
    if any(target.iterdir()):
        raise InputError(
            f"{target} holds other things (no {sign}), which would be deleted to write here; "
            "give another directory, or empty this one"
        )


def _scratch(target: Path, stack: ExitStack) -> Path:
    """A new directory beside `target`, locked as long as `stack` is open."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            stack.enter_context(locked(scratch))
        except (FileNotFoundError, BlockingIOError):  # swept before it was locked
            continue
        except OSError:  # a file system that locks no directories, such as NFS: nobody sweeps
            return scratch
        if scratch.exists():
            return scratch


def _sweep(target: Path) -> None:
    """Remove what killed processes left of `new_directory(target)`; those that live hold a lock."""
    for scratch in target.parent.glob(f".{glob.escape(target.name)}.????????"):  # mkdtemp's eight
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
    """Let two paths change places in one step; False where the system cannot do that."""
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
    """Write UTF-8 `text` to `path`, which holds either its old or its new content at any time."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which holds either its old or its new content at any time.

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
    """Flush a directory and all that is in it to the disk."""
    for path in (*directory.rglob("*"), directory):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that flushes no directories
            raise
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Make of any error that a full disk brings about while `path` is written one that says so.

    Raises:
        StorageError: instead of that error.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(folder).free
        unexplained = free < _LEAST_FREE and not isinstance(error, ClipDeployError)
        if not (_says_full(error) or unexplained):
            raise
        raise StorageError(
            f"{path} cannot be written: no space is left on the disk of {folder} ({free:,} bytes "
            f"free). What was there before is unchanged; free some space, or write elsewhere "
            f"({error})"
        ) from error


def _says_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, tells of a full disk; libraries quote the system."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(os.strerror(code) in str(error) for code in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link where the file system allows one."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copy2(source, target)


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
