"""Directories of images, and the text files beside them."""

import os
from collections.abc import Iterator
from pathlib import Path

from serving.errors import InputError, TextError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Suffixes of image files, in lower case."""


def walk(root: Path, inside: str = "") -> Iterator[str]:
    """Yield the files below a directory, in an order that depends only on their names.

    Includes regular files, links to them, and broken links, which callers report. Excludes pipes
    and devices, which could block. Links to directories are not followed. Memory holds the names of
    one directory per level.

    Yields:
        Paths relative to `root`, separated by `/`.

    Raises:
        InputError: a directory cannot be listed.
    """
    try:
        with os.scandir(root / inside) as entries:
            listed = sorted((e.name, e.is_dir(follow_symlinks=False), _is_file(e)) for e in entries)
    except OSError as error:
        raise InputError(f"{root / inside} cannot be listed: {error}") from error
    for name, is_directory, is_file in listed:
        path = f"{inside}/{name}" if inside else name
        if is_directory:
            yield from walk(root, path)
        elif is_file:
            yield path


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() or (entry.is_symlink() and not Path(entry).exists())


def find_images(directory: Path) -> list[Path]:
    """Return the image files below a directory, sorted.

    Raises:
        InputError: the directory does not exist, contains no images, or cannot be listed.
    """
    if not directory.is_dir():
        raise InputError(
            f"{directory} is not a directory", advice="give the path of a directory of images"
        )
    names = (name for name in walk(directory) if Path(name).suffix.lower() in SUFFIXES)
    found = sorted(directory / name for name in names)
    if not found:
        raise InputError(f"no images in {directory}; expected files of {', '.join(SUFFIXES)}")
    return found


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
