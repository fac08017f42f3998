"""Is what lies in a bundle what was exported? The checks behind `serving.bundles.bundle`.

They find damage, half a copy, files of another model, an edit by hand, and paths that lead out of
the bundle. They are no protection against someone who may write to it: who can make a manifest can
vouch for anything.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from serving.bundles.external_data import external_files
from serving.errors import BundleError
from serving.util.files import sha256_of

_SEAL = "checksum"


def sealed(document: dict[str, Any]) -> str:
    """The text of a manifest: `document` and its checksum."""
    return json.dumps({**document, _SEAL: _checksum(document)}, indent=2) + "\n"


def unsealed(document: dict[str, Any]) -> dict[str, Any]:
    """The document that `sealed` was given; to be checked by `check_seal` when it is understood."""
    return {key: value for key, value in document.items() if key != _SEAL}


def check_seal(document: dict[str, Any]) -> None:
    """Compare a sealed document with its checksum.

    Raises:
        ValueError: it is another.
    """
    found, wanted = _checksum(unsealed(document)), document.get(_SEAL)
    if found != wanted:
        raise ValueError(
            f"it was edited or damaged after it was written: its contents have the {_SEAL} "
            f"{found[:16]}..., it says {str(wanted)[:16]}..."
        )


def _checksum(document: dict[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_names(names: Iterable[str]) -> None:
    """Refuse names of files that lead out of the folder they are to be in.

    Raises:
        ValueError: one of them does.
    """
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it names the file {name!r}; expected a path inside of the bundle")


def checked_file(root: Path, name: str, sha256: str) -> Path:
    """The path of a file of the bundle at `root`, after comparing it with what was exported.

    Raises:
        BundleError: it is missing, another, or lies elsewhere.
    """
    path = root / name
    if not path.is_file():
        raise BundleError(f"{path} is missing; export the checkpoint again")
    if not (real := path.resolve()).is_relative_to(root.resolve()):
        raise BundleError(
            f"{path} is a link to {real}, outside of the bundle; put the file itself there"
        )
    if (found := sha256_of(path)) != sha256:
        raise BundleError(
            f"{path} is not the file that was exported: its sha256 is {found[:16]}..., the "
            f"manifest says {sha256[:16]}...; it was changed or damaged, export the checkpoint "
            "again"
        )
    return path


def check_external_data(graph: Path, vouched: set[str]) -> None:
    """Refuse an ONNX graph that takes weights from other files than those beside it in `vouched`.

    Raises:
        BundleError: it does, or it is no graph.
    """
    try:
        others = external_files(graph) - vouched
    except ValueError as error:
        raise BundleError(f"{graph} is no ONNX graph ({error}); export it again") from error
    if others:
        raise BundleError(
            f"{graph} takes weights from {min(others)!r}; expected a file beside it that the "
            "manifest vouches for, export the checkpoint again"
        )
