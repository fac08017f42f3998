"""Options that several commands of `python -m serving` share, and what they stand for."""

from pathlib import Path
from typing import Annotated

import typer

from serving.client import ClipClient
from serving.errors import InputError
from serving.folders import find_pictures
from serving.local import LocalClip

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Directory that `python -m export` made.")
]
Url = Annotated[
    str | None, typer.Option(help="A running server: grpc://host:port or http://host:port.")
]
LocalBundle = Annotated[
    Path | None, typer.Option("--bundle", help="A bundle to run in this process instead.")
]
LocalRunner = Annotated[
    str,
    typer.Option(
        "--runner",
        help="Of --bundle, such as openvino:int8; auto times those that passed the gate, and takes "
        "the fastest.",
    ),
]
LOCAL_RUNNER = "onnxruntime:fp32"
REPOSITORY = Path("build/model_repository")


def embedder_of(url: str | None, bundle: Path | None, runner: str) -> ClipClient | LocalClip:
    """The client of --url, or the bundle of --bundle in this process; enter it.

    Raises:
        InputError: both are given, or neither.
    """
    if url is not None and bundle is None:
        return ClipClient(url)
    if bundle is None or url is not None:
        raise InputError("give either --url of a running server or --bundle to run in this process")
    return LocalClip(bundle, runner)


def picture_files(paths: list[Path]) -> list[Path]:
    """Files as they are given, folders as the pictures in them."""
    files = []
    for path in paths:
        files += find_pictures(path) if path.is_dir() else [path]
    return files
