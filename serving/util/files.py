"""Atomic writes: files and directories are written under a temporary name, flushed and renamed.

The flush precedes the rename because a file system may store the new name before the data. Without
it, a power failure could replace a good old file by an empty one.

`check_file` and `check_directory` check a target before the work whose result is written to it.
`new_file` and `new_directory` write it. Links are followed: what they point to is replaced. Devices
and pipes, such as `/dev/null`, are never replaced: data is written to them directly.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from serving.errors import ClipDeployError, InputError, StorageError
from serving.util.locks import locked

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of an exhausted disk quota."""
_LEAST_FREE = 1 << 16
"""Amount of free space, in bytes, below which an error of unknown cause is attributed to a full
disk."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def check_file(path: Path) -> None:
    """Check that the file `path` can be written, before the work whose result it is to hold.

    Missing directories are created when the file is written.

    Raises:
        InputError: it is a directory, a read-only file, a socket or a disk, its name is too long,
            or its directory cannot be written.
    """
    with _unwritable(path):
        target = _file_target(path)
        if target is not None:
            _try_directory(target.parent)


def check_directory(path: Path) -> None:
    """Check that `path` is a directory in which files can be created, or that it can be created.

    Raises:
        InputError: it is not a directory, its name is too long, or it cannot be written.
    """
    _reject_stdout(path)
    with _unwritable(path):
        target = Path(os.path.realpath(path))
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(path.stat().st_mode):
                raise InputError(
                    f"{path} is a file, expected a directory",
                    advice="give the path of a directory to write",
                )
        _try_directory(target)


def check_utf8(path: Path) -> None:
    """Check that a path is valid UTF-8, for files that native libraries open.

    ONNX, its runtimes, safetensors, tokenizers, Triton and Ray take no other paths.

    Raises:
        InputError: it is not.
    """
    whole = path.absolute()
    try:
        str(whole).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the path {whole} is not valid UTF-8; the libraries in use cannot open it",
            advice="rename the directory",
        ) from error


def check_replaceable(target: Path, sign: str) -> None:
    """Check that `new_directory` can write to `target`, before the work whose result it holds.

    Raises:
        InputError: `target` is not a directory or cannot be written, it must not be replaced, or
            its path is not UTF-8.
    """
    check_utf8(target)
    check_directory(target)
    target = Path(os.path.realpath(target))
    if not target.exists() or (target / sign).exists():
        if os.path.ismount(target):
            raise InputError(
                f"{target} is a mount point, which cannot be replaced",
                advice="give a directory in it",
            )
        with _unwritable(target):
            _try_directory(target.parent)
        return
    if any(target.iterdir()):
        raise InputError(
            f"{target} holds other files (no {sign}), which would be deleted to write here",
            advice="give another directory, or empty this one",
        )


def _file_target(path: Path) -> Path | None:
    """Return the regular file that writing to `path` creates or replaces.

    Returns:
        The file, or None for a device, a pipe or an open file, which is written to directly.
    """
    _reject_stdout(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(mode):
        raise InputError(
            f"{path} is a directory, expected a file", advice="give the path of a file to write"
        )
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or _is_descriptor(path):
        return None
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{path} is a socket or a disk, expected a file",
            advice="give the path of a file to write",
        )
    if not os.access(path, os.W_OK):
        raise InputError(
            f"{path} is read-only", advice="change its permissions, or give another path"
        )
    return Path(os.path.realpath(path))


def _reject_stdout(path: Path) -> None:
    if str(path) == "-":
        raise InputError(
            "standard output is not supported here",
            advice="give the path of a file or directory to write; ./- is one named -",
        )


def _is_descriptor(path: Path) -> bool:
    """Return whether `path` names an open file of this process, such as /dev/fd/3."""
    if str(path) in ("/dev/stdin", "/dev/stdout", "/dev/stderr"):
        return True
    return os.path.realpath(path.parent).startswith("/proc/")


def _try_directory(directory: Path) -> None:
    """Create a file without a name in `directory`, or in its nearest ancestor that exists.

    The bits of permission alone do not tell whether this works, for example for root.
    """
    missing = []
    while not os.path.lexists(directory):
        missing.append(directory.name)
        directory = directory.parent
    with tempfile.TemporaryFile(dir=directory):
        if any(len(os.fsencode(name)) > _longest_name(directory) for name in missing):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _longest_name(directory: Path) -> int:
    """Return the maximum length of a file name, in bytes."""
    return os.pathconf(directory, "PC_NAME_MAX")


def _temporary_stem(target: Path, room: int) -> str:
    """Return `.NAME`, or a hash of the name if `room` more bytes would make it too long."""
    name = os.fsencode(target.name)
    if len(name) + 1 + room <= _longest_name(target.parent):
        return f".{target.name}"
    return f".{hashlib.sha256(name).hexdigest()[:32]}"


@contextmanager
def _unwritable(path: Path) -> Iterator[None]:
    """Raise an InputError in place of the operating system's errors, except that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}", advice="give another path"
        ) from error


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that atomically replaces `path` if the block ends without an error.

    Until then an existing file at `path` is unchanged. Missing directories are created. Two
    processes that write the same file wait for each other. Use the block only to write: any error
    of the operating system in it is reported as an error of `path`.

    Raises:
        InputError: `path` cannot be written; see `check_file`.
        StorageError: the disk is full.
    """
    with disk_errors(path), _unwritable(path):
        target = _file_target(path)
        if target is None:
            with path.open("wb") as out:
                yield out
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, file = _temporary_file(target)
        with file:
            try:
                if target.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_one(target.parent)


def _temporary_file(target: Path) -> tuple[Path, BinaryIO]:
    """Open the temporary file of `target`, locked: of two writers, one waits for the other.

    It always has the same name, so that the next write replaces what a killed process left.
    """
    temporary = target.with_name(f"{_temporary_stem(target, 4)}.tmp")
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            file = os.fdopen(os.open(temporary, flags, 0o666), "w+b")
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link or a socket
                raise
            temporary.unlink(missing_ok=True)
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: use a name of our own
            file.close()
            temporary.unlink(missing_ok=True)
            temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
            return temporary, temporary.open("xb")
        opened = os.fstat(file.fileno())
        if not stat.S_ISREG(opened.st_mode) or opened.st_nlink > 1:
            temporary.unlink(missing_ok=True)
        elif temporary.exists() and temporary.stat().st_ino == opened.st_ino:
            file.truncate()
            return temporary, file
        file.close()  # another writer has renamed it


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically; see `new_file`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: at any time the file has its old or its new content.

    Raises:
        InputError: `path` cannot be written.
        StorageError: the disk is full.
    """
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_directory(target: Path, sign: str) -> Iterator[Path]:
    """Yield a new directory that atomically replaces `target` if the block ends without an error.

    Until then an existing `target` is unchanged; after the exchange the old directory is deleted. A
    directory is replaced only if it is empty or contains the path `sign`, which identifies
    directories written by this project. If the file system has no atomic exchange, two renames
    replace it: a process killed between them leaves no `target`, and the next call restores the old
    one. Each call also removes the temporary directories of killed calls.

    Raises:
        InputError: `target` is a file, cannot be written, or must not be replaced.
        StorageError: the disk is full.
    """
    target = Path(os.path.realpath(target))
    with ExitStack() as stack, disk_errors(target):
        with _unwritable(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target)
            check_replaceable(target, sign)
            scratch = _scratch(target, stack)
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            new = scratch / "new"
            new.mkdir()
        yield new
        with _unwritable(target):
            sync(new)
            if not target.exists():
                new.rename(target)
            elif not _exchange(new, target):
                target.rename(scratch / "old")
                new.rename(target)
            _sync_one(target.parent)


def _scratch(target: Path, stack: ExitStack) -> Path:
    """Return a new directory beside `target`, locked until `stack` is closed."""
    while True:
        prefix = f"{_temporary_stem(target, _SCRATCH_SUFFIX)}."
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            stack.enter_context(locked(scratch))
        except (FileNotFoundError, BlockingIOError):  # removed by another process before the lock
            continue
        except OSError:  # no locks on directories, as on NFS: use it unlocked; no sweep removes it
            return scratch
        if scratch.exists():
            return scratch


_SCRATCH_SUFFIX = 9
"""Length of a dot and of the characters that `mkdtemp` appends."""


def _sweep(target: Path) -> None:
    """Remove scratch directories of killed `new_directory(target)` calls; live ones are locked."""
    prefix = glob.escape(_temporary_stem(target, _SCRATCH_SUFFIX))
    for scratch in target.parent.glob(f"{prefix}.????????"):
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
        directory = next(parent for parent in path.absolute().parents if os.path.isdir(parent))  # noqa: PTH112  Path raises errors
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
