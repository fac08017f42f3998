"""Command `embed`, which embeds images and texts."""

import io
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from serving.cli.console import Json, binary, document, note_skipped, progress, result, table
from serving.cli.documents import Embedded
from serving.cli.options import Connection, OnErrorOption, Truncate, connects, image_files
from serving.errors import InputError
from serving.tasks.readable import all_in_batches
from serving.util.files import check_file, write_bytes

_IMAGES = 64
"""Images embedded between two progress reports."""
_SHOWN = 20
_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@connects
def embed(
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE...", help="Image files, or directories of them."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text; may be repeated.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="NumPy .npz file to write: embeddings float32 (n, dim), and names (n,). - is "
            "standard output."
        ),
    ] = None,
    truncate: Truncate = False,
    on_error: OnErrorOption = "fail",
    as_json: Json = False,
    *,
    connection: Connection,
) -> None:
    """Embed images and texts: images first, then texts, in the order given."""
    to_stdout = str(output) in _STDOUT
    if to_stdout and as_json:
        raise InputError(
            "--output and --json cannot both write to standard output", advice="leave out one"
        )
    if output is not None and not to_stdout:
        check_file(output)
    files = image_files(images or [], on_error)
    if not files.paths and not text:
        raise InputError("nothing to embed", advice="give image files or directories, or --text")
    parts = []
    with connection.open() as embedder, progress("embedding images") as show, files.advising():
        if files.paths:
            parts.append(
                all_in_batches(
                    embedder.embed_images,
                    files.paths,
                    _IMAGES,
                    files.errors,
                    width=embedder.identity.embed_dim,
                    step="embedding images",
                    progress=show,
                )
            )
        if text:
            show("embedding texts")
            parts.append(embedder.embed_texts(text, truncate=truncate))
    embeddings = np.concatenate(parts)
    names = (*map(str, files.used), *(text or ()))
    if output is not None:
        buffer = io.BytesIO()
        np.savez(buffer, embeddings=embeddings, names=np.array(names))
        write = binary if to_stdout else partial(write_bytes, output)
        write(buffer.getvalue())
    if as_json:
        rows = () if output else tuple(map(tuple, embeddings.tolist()))
        document(
            Embedded(
                names=names,
                shape=(len(names), int(embeddings.shape[1])),
                embeddings=rows,
                skipped=files.skipped,
                ignored=files.ignored,
            )
        )
        return
    note_skipped(files.skipped, files.ignored)
    if to_stdout:
        return
    shown = [
        (name, " ".join(f"{value:+.4f}" for value in row[:6]) + " ...")
        for name, row in list(zip(names, embeddings, strict=True))[:_SHOWN]
    ]
    title = f"{len(names)} embeddings of {embeddings.shape[1]} dimensions"
    result(table(title, ("input", "first values"), shown))
    if output:
        result(f"wrote {output}")
