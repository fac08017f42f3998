"""Folders of labelled pictures, in ImageFolder's layout or with `captions.txt`."""

import re
from dataclasses import dataclass
from pathlib import Path

from serving.errors import InputError
from serving.util.directories import find_images, read_captions, read_lines

CLASS_NAMES = "classnames.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledFolder:
    """Pictures, each with the number of its label."""

    files: list[Path]
    truth: list[int]
    labels: list[str]
    """What is put into templates; the same name may stand for two labels, as in ImageNet's."""
    notes: list[str]
    """What someone who reads the accuracy should know of the folder."""


def read_folder(folder: Path) -> LabelledFolder:
    """The labelled pictures of `folder`, in either layout of this module's description.

    Raises:
        InputError: there are none, or a picture's folder has no name in `classnames.txt`.
        TextError: a text file is not UTF-8.
    """
    pictures = find_images(folder)
    if (folder / "captions.txt").exists():
        return _captioned(folder, pictures)
    return _image_folder(folder, pictures)


def _captioned(folder: Path, pictures: list[Path]) -> LabelledFolder:
    captions, listed = read_captions(folder), folder / "labels.txt"
    labels = read_lines(listed) if listed.exists() else sorted(set(captions.values()))
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InputError(f"{listed}: {min(twice)!r} is listed more than once; labels must differ")
    numbers = {label: number for number, label in enumerate(labels)}
    files = [file for file in pictures if captions.get(file.name) in numbers]
    if not files:
        raise InputError(
            f"{folder}: no picture has one of its {len(labels)} labels as caption; expected "
            "captions.txt with `file, label` a line"
        )
    truth = [numbers[captions[file.name]] for file in files]
    notes = []
    if others := len(pictures) - len(files):
        notes.append(f"{others} pictures left out: their caption is none of the labels")
    return LabelledFolder(
        files=files, truth=truth, labels=labels, notes=notes + _unseen(labels, truth)
    )


def _image_folder(folder: Path, pictures: list[Path]) -> LabelledFolder:
    listing = folder / CLASS_NAMES
    inside = {file: file.relative_to(folder).parts for file in pictures}
    inside = {file: parts for file, parts in inside.items() if not parts[0].startswith(".")}
    files = [file for file, parts in inside.items() if len(parts) > 1]
    if not files:
        raise InputError(
            f"{folder} holds pictures and no folders of them; expected {folder}/LABEL/*.jpg, or "
            "captions.txt with `file, label` a line"
        )
    folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    names = _class_names(listing) if listing.exists() else {name: name for name in folders}
    if unnamed := sorted({inside[file][0] for file in files} - names.keys()):
        raise InputError(
            f"{listing} has no name for {len(unnamed)} folders with pictures, such as "
            f"{unnamed[0]!r}; add `{unnamed[0]}, name`, or remove the folder"
        )
    numbers = {name: number for number, name in enumerate(names)}
    truth, labels = [numbers[inside[file][0]] for file in files], list(names.values())
    notes = []
    if loose := len(inside) - len(files):
        notes.append(f"{loose} pictures left out: they lie in no label's folder")
    if not listing.exists() and all(re.fullmatch(r"n?\d+", name) for name in names):
        notes.append(f"folders are named by numbers or WordNet ids; give names in {CLASS_NAMES}")
    if same := len(labels) - len(set(labels)):
        notes.append(f"{same} names stand for more than one label; of those the first is chosen")
    return LabelledFolder(
        files=files, truth=truth, labels=labels, notes=notes + _unseen(labels, truth)
    )


def _class_names(listing: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for line in read_lines(listing):
        name, comma, label = (part.strip() for part in line.partition(","))
        if not (name and comma and label):
            raise InputError(f"{listing}: expected `folder, name` a line, got {line!r}")
        if name in names:
            raise InputError(f"{listing}: folder {name!r} is listed more than once")
        names[name] = label
    return names


def _unseen(labels: list[str], truth: list[int]) -> list[str]:
    """A note where labels have no picture: they are chosen from all the same."""
    without = sorted(set(range(len(labels))) - set(truth))
    if not without:
        return []
    shown = ", ".join(repr(labels[number]) for number in without[:3])
    return [f"{len(without)} labels have no picture and may be chosen wrongly, such as {shown}"]
