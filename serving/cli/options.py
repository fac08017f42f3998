"""Options that several commands of `python -m serving` share, and what they stand for."""

from pathlib import Path
from typing import Annotated

import typer

from serving.clients.endpoint import Credentials
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import InputError
from serving.triton.network import ServerTls
from serving.util.directories import find_pictures

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Directory that `python -m export` made.")
]
Url = Annotated[
    str | None,
    typer.Option(
        help="A running server: grpc://host:port or http://host:port; grpcs or https with TLS."
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        envvar="CLIP_CA",
        help="Of grpcs or https: PEM file of the authority that the server's certificate is from; "
        "default: the public ones.",
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(
        envvar="CLIP_CERT", help="Of grpcs or https: PEM file of a certificate to show the server."
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(envvar="CLIP_KEY", help="PEM file of the key of --cert, without a password."),
]
Host = Annotated[
    str,
    typer.Option(help="IPv4 address to listen on; other than loopback it exposes the server."),
]
TlsCert = Annotated[
    Path | None, typer.Option(help="PEM file: gRPC with TLS, and HTTP on loopback only.")
]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file of the key of --tls-cert.")]
ClientCa = Annotated[
    Path | None,
    typer.Option(help="PEM file: gRPC clients must show a certificate of this authority."),
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        envvar="CLIP_ADMIN_KEY",
        help="Of the administrative APIs, among them statistics; better given by the environment "
        "variable, since a command line is readable by all users of the machine.",
    ),
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


def embedder_of(
    url: str | None,
    bundle: Path | None,
    runner: str,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
) -> ClipClient | LocalClip:
    """The client of --url, or the bundle of --bundle in this process; enter it.

    Raises:
        InputError: both are given, or neither.
    """
    if url is not None and bundle is None:
        credentials = Credentials(ca=ca, certificate=cert, key=key)
        return ClipClient(url, credentials=credentials)
    if bundle is None or url is not None:
        raise InputError("give either --url of a running server or --bundle to run in this process")
    return LocalClip(bundle, runner)


def server_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    """What --tls-cert, --tls-key and --client-ca ask for.

    Raises:
        InputError: they do not go together.
    """
    if cert is not None and key is not None:
        return ServerTls(certificate=cert, key=key, client_ca=client_ca)
    if (cert, key, client_ca) != (None, None, None):
        raise InputError(
            "TLS takes --tls-cert and --tls-key; with --client-ca, clients show one too"
        )
    return None


def picture_files(paths: list[Path]) -> list[Path]:
    """Files as they are given, folders as the pictures in them."""
    files = []
    for path in paths:
        files += find_pictures(path) if path.is_dir() else [path]
    return files
