"""A bundle on disk: what `export` writes and `serving` reads.

A bundle is a directory: `manifest.json`, `tokenizer.json`, and for each tower and precision
`<tower>.<precision>.onnx` (with `.onnx.data` beside it when over 2 GB), where it was asked for
`prefix_tree.<precision>.onnx`, the text tower over trees of tokens, and for TensorRT
`engines/<device>-<library>-<version>/<tower>.<precision>.plan` with its sidecar. The manifest is
the single source of truth about all of them, their names included (a plan that was built again is
called `.new.plan`); a file it does not vouch for is not loaded.

Does not know: how artifacts are made (`export`), or run (`serving.runners`).
"""

import json
from collections.abc import Iterable
from pathlib import Path

from serving.bundles.engine_facts import Library
from serving.bundles.integrity import (
    check_external_data,
    check_names,
    check_seal,
    checked_file,
    unsealed,
)
from serving.bundles.manifest import MANIFEST_FORMAT, Artifact, File, Graph, Manifest, Tower
from serving.errors import BundleError
from serving.util.files import sha256_of
from serving.util.typed_json import from_json


class Bundle:
    """A directory and its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read the manifest of the bundle at `path`.

        Raises:
            BundleError: there is no bundle, or its manifest is not of this format, was edited or
                damaged, or names files outside of the bundle.
        """
        file = path / "manifest.json"
        if not file.exists():
            raise BundleError(
                f"{path} is not a bundle: no manifest.json in it; "
                "make one with `clip-deploy export CHECKPOINT`"
            )
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            found = document.get("format") if isinstance(document, dict) else None
            if found != MANIFEST_FORMAT:
                raise BundleError(
                    f"{file}: manifest format {found!r}, this version reads {MANIFEST_FORMAT}; "
                    "export the checkpoint again"
                )
            manifest = from_json(Manifest, unsealed(document))
            check_seal(document)
            check_names(vouched.name for vouched in manifest.files)
            return cls(path, manifest)
        except ValueError as error:
            raise BundleError(f"{file}: {error}; export the checkpoint again") from error

    @property
    def tokenizer(self) -> Path:
        """The verified `tokenizer.json`."""
        return self._verified([self.manifest.tokenizer])

    def artifact(self, graph: Graph, precision: str) -> Artifact:
        """Return the ONNX graph `graph` in `precision`.

        Raises:
            BundleError: the bundle has none.
        """
        graphs = [a for a in self.manifest.artifacts if (a.graph, a.kind) == (graph, "onnx")]
        for artifact in graphs:
            if artifact.precision == precision:
                return artifact
        has = sorted(artifact.precision for artifact in graphs)
        option = "--prefix-tree " if graph == "prefix_tree" else ""
        raise BundleError(
            f"{self.path} has no {precision} {graph} graph, only {', '.join(has) or 'none'}",
            advice=f"export the checkpoint again with {option}--precision {precision}",
        )

    def plans(self, tower: Tower, precision: str, library: Library) -> list[Artifact]:
        """The plans of `tower` in `precision`, whatever device they were built on.

        Raises:
            BundleError: the bundle has none.
        """
        plans = [
            a
            for a in self.manifest.artifacts
            if (a.graph, a.kind, a.precision) == (tower, "engine", precision)
            and a.engine is not None
            and a.engine.library == library
        ]
        if not plans:
            raise BundleError(
                f"{self.path} has no {precision} {tower} plan of {library}; build it where it is "
                f"to run: {self.build_command(precision, library)}"
            )
        return plans

    def build_command(self, precision: str, library: Library) -> str:
        """What builds the plans of `precision` for the machine it is run on."""
        return f"clip-deploy engine {self.path} --engine {library} --precision {precision}"

    def verified(self, artifact: Artifact) -> Path:
        """The path of `artifact`'s graph, after comparing its files with the manifest.

        Raises:
            BundleError: a file is missing, is not the one that was exported, or reads others that
                the manifest does not vouch for.
        """
        path = self._verified(artifact.files)
        if artifact.kind == "onnx":
            check_external_data(path, {Path(file.name).name for file in artifact.files[1:]})
        return path

    def _verified(self, files: Iterable[File]) -> Path:
        paths = [checked_file(self.path, file.name, file.sha256) for file in files]
        return paths[0]


def describe_file(path: Path, root: Path | None = None) -> File:
    """What the manifest of the bundle at `root` (default: the file's folder) says of a file."""
    name = path.relative_to(root or path.parent).as_posix()
    return File(name=name, sha256=sha256_of(path), bytes=path.stat().st_size)
