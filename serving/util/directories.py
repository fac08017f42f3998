"""Folders of pictures and the text files beside them."""

from pathlib import Path

from serving.errors import InputError, TextError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def find_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder and its folders, by name.

    Raises:
        InputError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected a folder of pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"no pictures in {folder}; expected files of {', '.join(SUFFIXES)}")
    return found


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, stripped.

    Raises:
        InputError: it cannot be read.
        TextError: it is not UTF-8; the message says in which line.
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
            f"{file}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_captions(folder: Path) -> dict[str, str]:
    """File name -> caption, from the folder's `captions.txt` (`file, caption` a line) if any."""
    file = folder / "captions.txt"
    pairs = (line.split(",", 1) for line in (read_lines(file) if file.exists() else ()))
    return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
