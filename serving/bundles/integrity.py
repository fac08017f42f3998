"""Integrity checks of a bundle's files, used by `serving.bundles.bundle`.

The checks detect damaged files, incomplete copies, files of another model, manual edits, and paths
that lead outside the bundle. They do not protect against an attacker with write access to the
bundle, who can also write a matching manifest.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from serving.bundles.external_data import external_files
from serving.errors import BundleError
from serving.util.files import sha256_of
from serving.util.typed_json import json_text

_SEAL = "checksum"


def sealed(document: dict[str, Any]) -> str:
    """Return `document` with its checksum added, as JSON text."""
    return json_text({**document, _SEAL: _checksum(document)}, indent=2) + "\n"


def unsealed(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document without its checksum, which `check_seal` verifies after parsing."""
    return {key: value for key, value in document.items() if key != _SEAL}


def check_seal(document: dict[str, Any]) -> None:
    """Verify the checksum of a sealed document.

    Raises:
        ValueError: the checksum does not match.
    """
    found, wanted = _checksum(unsealed(document)), document.get(_SEAL)
    if found != wanted:
        raise ValueError(
            f"it was edited or damaged after it was written: its contents have the {_SEAL} "
            f"{found[:16]}..., its {_SEAL} field says {str(wanted)[:16]}..."
        )


def _checksum(document: dict[str, Any]) -> str:
    text = json_text(document, canonical=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_names(names: Iterable[str]) -> None:
    """Check that file names are relative paths that stay inside the bundle.

    Raises:
        ValueError: a name is empty, absolute, or contains `..`.
    """
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it names the file {name!r}; expected a path inside the bundle")


def checked_file(root: Path, name: str, sha256: str) -> Path:
    """Return the path of a file of the bundle at `root`, after verifying its sha256.

    Raises:
        BundleError: the file is missing, has another sha256, or is a link to a file outside the
            bundle.
    """
    path = root / name
    if not path.is_file():
        raise BundleError(f"{path} is missing", advice="export the checkpoint again")
    if not (real := path.resolve()).is_relative_to(root.resolve()):
        raise BundleError(
            f"{path} is a link to {real}, outside the bundle",
            advice="replace the link with the file itself",
        )
    if (found := sha256_of(path)) != sha256:
        raise BundleError(
            f"{path} is not the file that was exported, it was changed or damaged: its sha256 is "
            f"{found[:16]}..., the manifest says {sha256[:16]}...",
            advice="export the checkpoint again",
        )
    return path


def check_external_data(graph: Path, listed: set[str]) -> None:
    """Check that an ONNX graph reads weights only from the files `listed` in its directory.

    Raises:
        BundleError: it names another file, or it is not an ONNX graph.
    """
    try:
        others = external_files(graph) - listed
    except ValueError as error:
        raise BundleError(
            f"{graph} is not an ONNX graph ({error})", advice="export the checkpoint again"
        ) from error
    if others:
        raise BundleError(
            f"{graph} reads weights from {min(others)!r}; expected a file in the same directory "
            "that the manifest lists",
            advice="export the checkpoint again",
        )
