"""Directories of images, and the text files beside them.

All commands find their files by `walk`, by one policy: regular files are used, and links to regular
files. Links to directories are not followed. Broken and looping links, pipes, sockets, devices and
directories that cannot be listed are reported, and never opened.
"""

import errno
import fnmatch
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

from serving.errors import InputError, TextError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp")
"""Suffixes of image files, in lower case: those that Pillow knows for the formats decoded here."""
LINKED_DIRECTORIES = "links to directories"
_SHOWN_SUFFIXES = 8
_LISTINGS = ("captions.txt", "labels.txt", "classnames.txt", "dataset.json")
"""Files beside the images that commands read."""
MISSING = "no such file"
_DIRECTORY = "is a directory"


@dataclass(frozen=True, slots=True)
class Item:
    """Something found in a directory."""

    name: str
    """Path relative to the directory, with `/`."""
    problem: str = ""
    """The reason why it cannot be read, or ""."""
    kind: Literal["file", "directory", "linked directory"] = "file"
    """A directory is an item only if it cannot be listed, or if it is a link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A file that could not be used."""

    path: str
    reason: str


@dataclass(slots=True, kw_only=True)
class Found:
    """Image files of a directory."""

    files: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    """Links, pipes and directories that cannot be read, by path."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of files of other kinds, by suffix in lower case, and of `LINKED_DIRECTORIES`. Lists
    of captions and labels are not counted."""

    def add(self, other: "Found") -> None:
        """Add the files of another directory."""
        self.files += other.files
        self.skipped += other.skipped
        self.ignored += other.ignored


def problem_of(path: str | os.PathLike[str]) -> str:
    """Return why `path` is not a file that can be read, or "". It is not opened."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  accepts any path-like object
    except FileNotFoundError:
        broken = os.path.islink(path)  # noqa: PTH114
        return "is a link to a file that does not exist" if broken else MISSING
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads to itself"
        return f"cannot be read: {error.strerror}"
    except ValueError as error:  # a NUL character
        return f"cannot be read: {error}"
    if stat.S_ISREG(mode):
        return ""
    if stat.S_ISDIR(mode):
        return _DIRECTORY
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file"


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a directory; unlike `Path.is_dir`, for any path."""
    return os.path.isdir(path)  # noqa: PTH112


def walk(root: Path, enter: Callable[[str], bool] = lambda _: True) -> Iterator[Item]:
    """Yield what is found below a directory, in an order that depends only on the names.

    Memory holds the names of one directory per level.

    Args:
        root: the directory.
        enter: returns whether to search a subdirectory, given its path relative to `root`.

    Raises:
        InputError: `root` cannot be listed.
    """
    try:
        listed = _listed(root)
    except OSError as error:
        raise InputError(f"{root} cannot be listed: {error.strerror}") from error
    yield from _walk(root, "", listed, enter)


def _listed(directory: Path) -> list[tuple[str, bool, bool]]:
    """Return names, and whether they are directories and regular files, sorted."""
    with os.scandir(directory) as entries:
        return sorted(
            (e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False))
            for e in entries
        )


def _walk(
    root: Path, inside: str, listed: list[tuple[str, bool, bool]], enter: Callable[[str], bool]
) -> Iterator[Item]:
    for name, is_directory, is_file in listed:
        path = f"{inside}/{name}" if inside else name
        if is_file:
            yield Item(path)
        elif not is_directory:
            problem = problem_of(root / path)
            linked = problem == _DIRECTORY
            yield Item(path, kind="linked directory") if linked else Item(path, problem)
        elif enter(path):
            try:
                below = _listed(root / path)
            except OSError as error:
                yield Item(path, f"cannot be listed: {error.strerror}", "directory")
                continue
            yield from _walk(root, path, below, enter)


def find_images(directory: Path) -> Found:
    """Return the image files below a directory, sorted.

    Raises:
        InputError: the directory does not exist, cannot be listed, or contains no images.
    """
    if not is_directory(directory):
        raise InputError(
            f"{directory} is not a directory", advice="give the path of a directory of images"
        )
    found = Found()
    for item in walk(directory):
        suffix = PurePath(item.name).suffix.lower()
        if item.kind == "linked directory":
            found.ignored[LINKED_DIRECTORIES] += 1
        elif item.problem and (item.kind == "directory" or suffix in SUFFIXES):
            found.skipped.append(Skipped(path=str(directory / item.name), reason=item.problem))
        elif suffix in SUFFIXES:
            found.files.append(directory / item.name)
        elif PurePath(item.name).name not in _LISTINGS:
            found.ignored[suffix] += 1
    found.files.sort()
    if not found.files:
        reason = f"no images in {directory}; expected files of {', '.join(SUFFIXES)}"
        if found.ignored:
            reason += f"; ignored {described(found.ignored)}"
        if found.skipped:
            reason += f"; {found.skipped[0].path} {found.skipped[0].reason}"
        raise InputError(reason)
    return found


def described(ignored: Mapping[str, int]) -> str:
    """Return a text such as `3 files that are not images (2 .heic, 1 without a suffix)`.

    Args:
        ignored: see `Found.ignored`.
    """
    counts = Counter(ignored)
    links = counts.pop(LINKED_DIRECTORIES, 0)
    parts = []
    if counts:
        shown = counts.most_common(_SHOWN_SUFFIXES)
        listed = [f"{count} {suffix or 'without a suffix'}" for suffix, count in shown]
        if more := counts.total() - sum(count for _, count in shown):
            listed.append(f"{more} others")
        parts.append(f"{counts.total()} files that are not images ({', '.join(listed)})")
    if links:
        parts.append(f"{links} {LINKED_DIRECTORIES}")
    return " and ".join(parts)


class Pattern:
    """Pattern of paths, as a shell expands it: `*`, `?`, `[...]`, and `**` for any directories.

    Names that exist win over patterns: the leading parts of the path that exist, such as a
    directory `photos [2024]`, are not interpreted. Wildcards do not match names that begin with a
    dot.

    Args:
        text: the pattern.
    """

    def __init__(self, text: str) -> None:
        parts = list(Path(text).parts)
        root = Path(parts.pop(0)) if Path(text).is_absolute() else Path()
        while parts and (not _has_magic(parts[0]) or os.path.lexists(root / parts[0])):
            root /= parts.pop(0)
        self.root = root
        """Leading part of the path, without wildcards."""
        self._parts = tuple(parts)

    @property
    def recursive(self) -> bool:
        """True if the pattern matches files at any depth."""
        return "**" in self._parts

    def walk(self) -> Iterator[Item]:
        """Yield the items below `root` that match; see `walk`. Nothing if `root` does not exist.

        Raises:
            InputError: `root` cannot be listed.
        """
        if not is_directory(self.root):
            return
        for item in walk(self.root, self._may_hold):
            names = tuple(item.name.split("/"))
            if _matches(names, self._parts) or item.kind == "directory":
                yield item

    def _may_hold(self, directory: str) -> bool:
        return _begins(tuple(directory.split("/")), self._parts)


def _has_magic(part: str) -> bool:
    return any(character in part for character in "*?[")


def _is_match(name: str, part: str) -> bool:
    hidden = name.startswith(".") and not part.startswith(".")
    return name == part or (not hidden and fnmatch.fnmatchcase(name, part))


def _matches(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Return whether a whole path matches a pattern."""
    if not parts:
        return not names
    if parts[0] != "**":
        return bool(names) and _is_match(names[0], parts[0]) and _matches(names[1:], parts[1:])
    if _matches(names, parts[1:]):
        return True
    return bool(names) and not names[0].startswith(".") and _matches(names[1:], parts)


def _begins(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Return whether a path below the directory `names` could match a pattern."""
    if not names:
        return bool(parts)
    if not parts:
        return False
    if parts[0] != "**":
        return _is_match(names[0], parts[0]) and _begins(names[1:], parts[1:])
    return _begins(names, parts[1:]) or (not names[0].startswith(".") and _begins(names[1:], parts))


def read_lines(file: Path) -> list[str]:
    """Return the non-blank lines of a UTF-8 text file, stripped.

    Raises:
        InputError: the file cannot be read.
        TextError: the file is not UTF-8; the message names the line.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(
            f"not UTF-8 ({error.reason})",
            name=f"{file}, line {line}",
            advice="save the file as UTF-8",
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_captions(directory: Path) -> dict[str, str]:
    """Return file name -> caption from the directory's `captions.txt`; empty without that file.

    Each line of the file is `file, caption`.
    """
    file = directory / "captions.txt"
    pairs = (line.split(",", 1) for line in (read_lines(file) if file.exists() else ()))
    return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
