"""`embed`: images and texts become embeddings."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table

from serving.cli.console import Json, log, out
from serving.cli.options import (
    LOCAL_RUNNER,
    Ca,
    Cert,
    Key,
    LocalBundle,
    LocalRunner,
    Url,
    embedder_of,
    picture_files,
)
from serving.errors import InputError


def embed(
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Picture files, or folders of them.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="NumPy .npz with `embeddings` float32 [n, dim] and `names` [n]."),
    ] = None,
    url: Url = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    bundle: LocalBundle = None,
    runner: LocalRunner = LOCAL_RUNNER,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = (
        False
    ),
    as_json: Json = False,
) -> None:
    """Embed pictures and texts: pictures first, then texts, in the order given."""
    files = picture_files(pictures or [])
    if not files and not text:
        raise InputError("nothing to embed; give picture files or folders, or --text")
    parts = []
    with embedder_of(url, bundle, runner, ca, cert, key) as embedder:
        starts = track(range(0, len(files), 64), "embedding pictures", console=log)
        parts += [embedder.embed_images(files[start : start + 64]) for start in starts]
        if text:
            parts.append(embedder.embed_texts(text, truncate=truncate))
    embeddings = np.concatenate(parts)
    names = [*map(str, files), *(text or [])]
    if output is not None:
        _save(output, embeddings, names)
    if as_json:
        rows = [] if output else embeddings.tolist()
        print(json.dumps({"names": names, "shape": embeddings.shape, "embeddings": rows}))
        return
    table = Table(title=f"{len(names)} embeddings of {embeddings.shape[1]} dimensions")
    for column in ("input", "first values"):
        table.add_column(column, overflow="fold")
    for name, row in list(zip(names, embeddings, strict=True))[:20]:
        table.add_row(name, " ".join(f"{value:+.4f}" for value in row[:6]) + " ...")
    out.print(table)
    if output:
        out.print(f"wrote {output}")


def _save(path: Path, embeddings: NDArray[np.float32], names: list[str]) -> None:
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez(temporary, embeddings=embeddings, names=np.array(names))
    temporary.replace(path)
