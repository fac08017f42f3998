"""Files that are never half there: written under a temporary name, then renamed."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.errors import InputError


@contextmanager
def new_directory(target: Path, sign: str) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends without an error.

    What was at `target` stays whole until then, and is deleted after it gave way. That is done only
    to a directory that holds `sign`, a path by which one of ours is known, or nothing at all.

    Raises:
        InputError: something else is at `target`.
    """
    if target.exists() and not (target / sign).exists():
        if not target.is_dir():
            raise InputError(f"{target} is a file; expected the name of a directory to write")
        if any(target.iterdir()):
            raise InputError(
                f"{target} holds other things (no {sign}), which would be deleted to write here; "
                "give another directory, or empty this one"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, which holds either its old or its new content at any time."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which holds either its old or its new content at any time."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


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
