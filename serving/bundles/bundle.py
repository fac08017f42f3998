"""The bundle on disk, which `export` writes and `serving` reads.

A bundle is a directory with these files:

- `manifest.json` and `tokenizer.json`.
- `<tower>.<precision>.onnx` for each tower and precision, with `.onnx.data` beside it if the graph
  is larger than 2 GB.
- `prefix_tree.<precision>.onnx`, if requested: the text tower over trees of tokens.
- `engines/<device>-<library>-<version>/<tower>.<precision>.plan` for TensorRT, with a sidecar.

The manifest is the single source of truth about all of them, including their names (an engine that
was rebuilt is named `.new.plan`). A file that the manifest does not list is not loaded.

This module does not know how artifacts are made (`export`) or run (`serving.runners`).
"""

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
from serving.util.files import check_utf8, sha256_of
from serving.util.typed_json import from_json, parse_json


class Bundle:
    """A bundle's directory and its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read the manifest of the bundle at `path`.

        Raises:
            BundleError: there is no bundle at `path`, or its manifest has another format, was
                edited or damaged, has a number out of range, or names files outside the
                bundle.
            InputError: `path` is not valid UTF-8.
        """
        check_utf8(path)
        file = path / "manifest.json"
        if not file.exists():
            raise BundleError(
                f"{path} is not a bundle: it has no manifest.json",
                advice="make a bundle with `clip-deploy export CHECKPOINT`",
            )
        try:
            document = parse_json(file.read_text(encoding="utf-8"))
            found = document.get("format") if isinstance(document, dict) else None
            if found != MANIFEST_FORMAT:
                raise BundleError(
                    f"{file}: expected manifest format {MANIFEST_FORMAT}, found {found!r}",
                    advice="export the checkpoint again",
                )
            manifest = from_json(Manifest, unsealed(document))
            manifest.check()
            check_seal(document)
            check_names(listed.name for listed in manifest.files)
            return cls(path, manifest)
        except ValueError as error:
            raise BundleError(f"{file}: {error}", advice="export the checkpoint again") from error

    @property
    def tokenizer(self) -> Path:
        """Path of `tokenizer.json`, after its checksum was verified."""
        return self._verified([self.manifest.tokenizer])

    def artifact(self, graph: Graph, precision: str) -> Artifact:
        """Return the artifact of the ONNX graph `graph` in `precision`.

        Raises:
            BundleError: the bundle has no such graph.
        """
        graphs = [a for a in self.manifest.artifacts if (a.graph, a.kind) == (graph, "onnx")]
        for artifact in graphs:
            if artifact.precision == precision:
                return artifact
        available = sorted(artifact.precision for artifact in graphs)
        option = "--prefix-tree " if graph == "prefix_tree" else ""
        raise BundleError(
            f"{self.path} has no {precision} {graph} graph, only {', '.join(available) or 'none'}",
            advice=f"export the checkpoint again with {option}--precision {precision}",
        )

    def plans(self, tower: Tower, precision: str, library: Library) -> list[Artifact]:
        """Return the engines of `tower` in `precision`, built on any device.

        Raises:
            BundleError: the bundle has no such engine.
        """
        engines = [
            a
            for a in self.manifest.artifacts
            if (a.graph, a.kind, a.precision) == (tower, "engine", precision)
            and a.engine is not None
            and a.engine.library == library
        ]
        if not engines:
            raise BundleError(
                f"{self.path} has no {precision} {tower} engine of {library}",
                advice="build it on the machine that will run it: "
                f"{self.build_command(precision, library)}",
            )
        return engines

    def build_command(self, precision: str, library: Library) -> str:
        """Return the command that builds the engines of `precision` for the machine it runs on."""
        return f"clip-deploy engine {self.path} --engine {library} --precision {precision}"

    def verified(self, artifact: Artifact) -> Path:
        """Return the path of `artifact`'s graph, after verifying its files against the manifest.

        Raises:
            BundleError: a file is missing, differs from the exported one, or reads a file that the
                manifest does not list.
        """
        path = self._verified(artifact.files)
        if artifact.kind == "onnx":
            check_external_data(path, {Path(file.name).name for file in artifact.files[1:]})
        return path

    def _verified(self, files: Iterable[File]) -> Path:
        paths = [checked_file(self.path, file.name, file.sha256) for file in files]
        return paths[0]


def describe_file(path: Path, root: Path | None = None) -> File:
    """Return the manifest entry of a file in the bundle at `root` (default: its directory)."""
    name = path.relative_to(root or path.parent).as_posix()
    return File(name=name, sha256=sha256_of(path), bytes=path.stat().st_size)
