"""Command `embed`, which embeds images and texts."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from serving.cli.console import Json, document, progress, result, table
from serving.cli.documents import Embedded
from serving.cli.options import Connection, Truncate, connects, image_files
from serving.errors import InputError

_IMAGES = 64
"""Images embedded between two progress reports."""
_SHOWN = 20


@connects
def embed(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE...", help="Image files, or directories of them."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text; may be repeated.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="NumPy .npz file to write: embeddings float32 (n, dim), and names (n,)."),
    ] = None,
    truncate: Truncate = False,
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Embed images and texts: images first, then texts, in the order given."""
    files = image_files(images or [])
    if not files and not text:
        raise InputError("nothing to embed", advice="give image files or directories, or --text")
    parts = []
    with connection.open() as embedder, progress("embedding images") as show:
        for start in range(0, len(files), _IMAGES):
            show("embedding images", start, len(files))
            parts.append(embedder.embed_images(files[start : start + _IMAGES]))
        if text:
            show("embedding texts")
            parts.append(embedder.embed_texts(text, truncate=truncate))
    embeddings = np.concatenate(parts)
    names = (*map(str, files), *(text or ()))
    if output is not None:
        _save(output, embeddings, names)
    if as_json:
        rows = () if output else tuple(map(tuple, embeddings.tolist()))
        shape = len(names), int(embeddings.shape[1])
        document(Embedded(names=names, shape=shape, embeddings=rows))
        return
    shown = [
        (name, " ".join(f"{value:+.4f}" for value in row[:6]) + " ...")
        for name, row in list(zip(names, embeddings, strict=True))[:_SHOWN]
    ]
    title = f"{len(names)} embeddings of {embeddings.shape[1]} dimensions"
    result(table(title, ("input", "first values"), shown))
    if output:
        result(f"wrote {output}")


def _save(path: Path, embeddings: NDArray[np.float32], names: tuple[str, ...]) -> None:
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez(temporary, embeddings=embeddings, names=np.array(names))
    temporary.replace(path)
