"""Directories of labelled images, in torchvision's ImageFolder layout or with `captions.txt`."""

import re
from dataclasses import dataclass
from pathlib import Path

from serving.errors import InputError
from serving.util.directories import described, find_images, read_captions, read_lines

CLASS_NAMES = "classnames.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledFolder:
    """Images, each with the index of its label."""

    files: list[Path]
    truth: list[int]
    """Index of each file's label in `labels`."""
    labels: list[str]
    """Names to insert into prompt templates. Two labels may share a name, as in ImageNet."""
    notes: list[str]
    """Remarks about the directory, to be shown with the accuracy."""


def read_folder(directory: Path) -> LabelledFolder:
    """Return the labelled images of `directory`, in either layout.

    Raises:
        InputError: there are no labelled images, or `classnames.txt` lacks a directory with images.
        TextError: a text file is not UTF-8.
    """
    images = find_images(directory)
    captioned = (directory / "captions.txt").exists()
    found = (_captioned if captioned else _image_folder)(directory, images.files)
    found.notes.extend(f"{item.path}: {item.reason}" for item in images.skipped)
    if images.ignored:
        found.notes.append(f"ignored {described(images.ignored)}")
    return found


def _captioned(directory: Path, images: list[Path]) -> LabelledFolder:
    captions, listed = read_captions(directory), directory / "labels.txt"
    labels = read_lines(listed) if listed.exists() else sorted(set(captions.values()))
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InputError(
            f"{listed}: {min(twice)!r} is listed more than once; labels must be unique"
        )
    numbers = {label: number for number, label in enumerate(labels)}
    files = [file for file in images if captions.get(file.name) in numbers]
    if not files:
        raise InputError(
            f"{directory}: no image has one of the {len(labels)} labels as its caption",
            advice="add lines `file, label` to captions.txt",
        )
    truth = [numbers[captions[file.name]] for file in files]
    notes = []
    if others := len(images) - len(files):
        notes.append(f"left out {others} images whose caption is not a label")
    return LabelledFolder(
        files=files, truth=truth, labels=labels, notes=notes + _unseen(labels, truth)
    )


def _image_folder(directory: Path, images: list[Path]) -> LabelledFolder:
    listing = directory / CLASS_NAMES
    inside = {file: file.relative_to(directory).parts for file in images}
    inside = {file: parts for file, parts in inside.items() if not parts[0].startswith(".")}
    files = [file for file, parts in inside.items() if len(parts) > 1]
    if not files:
        raise InputError(
            f"{directory} has images but no subdirectories of images; expected "
            f"{directory}/LABEL/*.jpg, or captions.txt with one `file, label` per line"
        )
    found = sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name[0] != ".")
    names = _class_names(listing) if listing.exists() else {name: name for name in found}
    if unnamed := sorted({inside[file][0] for file in files} - names.keys()):
        raise InputError(
            f"{listing} has no name for {len(unnamed)} directories with images, such as "
            f"{unnamed[0]!r}",
            advice=f"add a line `{unnamed[0]}, name`, or remove the directory",
        )
    numbers = {name: number for number, name in enumerate(names)}
    truth, labels = [numbers[inside[file][0]] for file in files], list(names.values())
    notes = []
    if loose := len(inside) - len(files):
        notes.append(f"left out {loose} images that are in no label's directory")
    if not listing.exists() and all(re.fullmatch(r"n?\d+", name) for name in names):
        notes.append(
            f"directories are named by numbers or WordNet ids; list class names in {CLASS_NAMES}"
        )
    if same := len(labels) - len(set(labels)):
        notes.append(
            f"{same} labels repeat the name of an earlier label; the earlier one is predicted"
        )
    return LabelledFolder(
        files=files, truth=truth, labels=labels, notes=notes + _unseen(labels, truth)
    )


def _class_names(listing: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for line in read_lines(listing):
        name, comma, label = (part.strip() for part in line.partition(","))
        if not (name and comma and label):
            raise InputError(f"{listing}: expected one `directory, name` per line, got {line!r}")
        if name in names:
            raise InputError(f"{listing}: directory {name!r} is listed more than once")
        names[name] = label
    return names


def _unseen(labels: list[str], truth: list[int]) -> list[str]:
    """Return a note if labels have no image; they can be predicted nevertheless."""
    without = sorted(set(range(len(labels))) - set(truth))
    if not without:
        return []
    shown = ", ".join(repr(labels[number]) for number in without[:3])
    return [f"{len(without)} labels have no image but can still be predicted, such as {shown}"]
