"""Options that several commands share, and the objects that they describe."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from serving.clients.endpoint import Credentials
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import ImageError, InputError, worded
from serving.tasks.readable import Errors
from serving.triton.network import ServerTls
from serving.util.directories import Found, Skipped, find_images, is_directory, problem_of

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Directory that `clip-deploy export` wrote.")
]
Images = Annotated[
    list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or directories of them.")
]
OnError = Literal["fail", "skip"]
OnErrorOption = Annotated[
    OnError,
    typer.Option(
        "--on-error",
        help="Handling of an image that cannot be used: fail ends the command without a result; "
        "skip leaves the image out and lists it. If none can be used, the command fails.",
    ),
]
Truncate = Annotated[
    bool, typer.Option("--truncate", help="Cut texts that are longer than the model's context.")
]
ExifOrientation = Annotated[
    bool,
    typer.Option(
        "--exif-orientation",
        help="Rotate and mirror images as their EXIF orientation says. The reference pipelines of "
        "CLIP ignore it.",
    ),
]
Scale16Bit = Annotated[
    bool,
    typer.Option(
        "--scale-16-bit",
        help="Scale 16-bit grayscale images to 8 bits. The reference pipelines of CLIP clip their "
        "values at 255.",
    ),
]
REPOSITORY = Path("build/model_repository")

_CONNECTION: dict[str, Any] = {
    "url": Annotated[
        str | None,
        typer.Option(
            help="URL of a running server: grpc://host:port or http://host:port; with TLS grpcs:// "
            "or https://."
        ),
    ],
    "ca": Annotated[
        Path | None,
        typer.Option(
            envvar="CLIP_CA",
            help="PEM file with the authority that signed the server's certificate. Default: the "
            "public ones.",
        ),
    ],
    "cert": Annotated[
        Path | None,
        typer.Option(envvar="CLIP_CERT", help="PEM file with the certificate of this client."),
    ],
    "key": Annotated[
        Path | None,
        typer.Option(
            envvar="CLIP_KEY", help="PEM file with the unencrypted private key of --cert."
        ),
    ],
}
_LOCAL: dict[str, Any] = {
    "bundle": Annotated[
        Path | None, typer.Option(help="Bundle to run in this process, instead of --url.")
    ],
    "runner": Annotated[
        str | None,
        typer.Option(
            help="Runner of --bundle, such as openvino:int8. Default: auto, which times those that "
            "passed the parity gate and takes the fastest.",
        ),
    ],
    "exif_orientation": ExifOrientation,
    "scale_16_bit": Scale16Bit,
}
_FLAGS = ("exif_orientation", "scale_16_bit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Values of the connection options of a command."""

    url: str | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    bundle: Path | None = None
    runner: str | None = None
    exif_orientation: bool = False
    scale_16_bit: bool = False

    def check(self) -> None:
        """Check the options of `connects`.

        Raises:
            InputError: the options contradict each other.
        """
        if (self.url is None) == (self.bundle is None):
            raise InputError(
                "expected either --url of a running server or --bundle to run in this process, got "
                + ("neither" if self.url is None else "both")
            )
        if self.bundle is not None:
            given = [name for name in ("ca", "cert", "key") if getattr(self, name) is not None]
            if given:
                raise InputError(
                    f"--{given[0]} belongs to --url, but --bundle was given",
                    advice=f"leave out --{given[0]}, or give --url instead of --bundle",
                )
        elif self.runner is not None:
            raise InputError(
                "--runner belongs to --bundle, but --url was given",
                advice="choose the runner of a server with `clip-deploy assemble --runner`",
            )
        else:
            for name in _FLAGS:
                if getattr(self, name):
                    option = f"--{name.replace('_', '-')}"
                    raise InputError(
                        f"{option} belongs to --bundle, but --url was given",
                        advice=f"assemble the server's repository with {option}",
                    )

    def open(self) -> ClipClient | LocalClip:
        """Return a client of --url, or of --bundle in this process; enter it before use."""
        if self.bundle is not None:
            return LocalClip(
                self.bundle,
                self.runner or "auto",
                exif_orientation=self.exif_orientation,
                scale_16_bit=self.scale_16_bit,
            )
        return self.client()

    def client(self) -> ClipClient:
        """Return a client of --url; enter it before use.

        Raises:
            InputError: --url is missing.
        """
        if self.url is None:
            raise InputError("expected --url of a running server")
        credentials = Credentials(ca=self.ca, certificate=self.cert, key=self.key)
        return ClipClient(self.url, credentials=credentials)


def connects(command: Callable[..., None]) -> Callable[..., None]:
    """Add the connection options to a command: --url, --ca, --cert, --key, --bundle, --runner,
    --exif-orientation, --scale-16-bit.

    The command receives their values as one argument `connection`.
    """
    return _with_options(command, _CONNECTION | _LOCAL)


def connects_to_server(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a connection to a server to a command: --url, --ca, --cert, --key."""
    return _with_options(command, _CONNECTION)


def _with_options(command: Callable[..., None], options: dict[str, Any]) -> Callable[..., None]:
    signature = inspect.signature(command)
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name in _FLAGS else None,
            annotation=annotation,
        )
        for name, annotation in options.items()
    ]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name != "connection"
    ]
    last = [parameter for parameter in own if parameter.name == "as_json"]
    first = [parameter for parameter in own if parameter.name != "as_json"]

    @functools.wraps(command)
    def wrapper(context: typer.Context, **values: Any) -> None:
        given = {name: values.pop(name) for name in options}
        if given.get("bundle") is not None:
            # Credentials from environment variables are meant for servers; --bundle ignores them.
            for name in given:
                source = context.get_parameter_source(name)
                if source is not None and source.name == "ENVIRONMENT":
                    given[name] = None
        connection = Connection(**given)
        if "bundle" in options:
            connection.check()
        command(connection=connection, **values)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *first, *shared, *last]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return wrapper


Host = Annotated[
    str,
    typer.Option(help="IPv4 address to listen on. Any other than loopback exposes the server."),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        help="PEM file with the server's certificate. Enables TLS for gRPC; HTTP stays on loopback."
    ),
]
TlsKey = Annotated[
    Path | None, typer.Option(help="PEM file with the unencrypted private key of --tls-cert.")
]
ClientCa = Annotated[
    Path | None,
    typer.Option(
        help="PEM file with an authority. gRPC clients must then have a certificate that it signed."
    ),
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        envvar="CLIP_ADMIN_KEY",
        help="Key of the administrative APIs, which include statistics. Prefer the environment "
        "variable: all users of a machine can read command lines.",
    ),
]


def server_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    """Return the TLS settings of --tls-cert, --tls-key and --client-ca.

    Raises:
        InputError: one of --tls-cert and --tls-key is missing.
    """
    if cert is not None and key is not None:
        return ServerTls(certificate=cert, key=key, client_ca=client_ca)
    if (cert, key, client_ca) != (None, None, None):
        raise InputError(
            "TLS needs both --tls-cert and --tls-key",
            advice="give both; --client-ca additionally requires certificates of clients",
        )
    return None


@dataclass(slots=True)
class ImageFiles:
    """Images given on a command line, and those of them that cannot be used."""

    found: Found
    errors: Errors | None
    """Receives the error of each image by its index in `paths`. None with `--on-error fail`."""

    @property
    def paths(self) -> list[Path]:
        """Image files, with directories replaced by the images in them."""
        return self.found.files

    @property
    def used(self) -> list[Path]:
        """The images without an error."""
        return [path for index, path in enumerate(self.paths) if index not in (self.errors or ())]

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The images that were left out."""
        errors = sorted((self.errors or {}).items())
        failed = [
            Skipped(path=str(self.paths[index]), reason=worded(error.reason, error.advice))
            for index, error in errors
        ]
        return (*self.found.skipped, *failed)

    @property
    def ignored(self) -> dict[str, int]:
        """Number of other files in the directories, by suffix."""
        return dict(self.found.ignored)

    @contextmanager
    def advising(self) -> Iterator[None]:
        """Advise `--on-error skip` if an image cannot be used."""
        try:
            yield
        except ImageError as error:
            if self.errors is not None:
                raise
            skip = "give --on-error skip to leave such images out"
            raise error.advised(f"{error.advice}, or {skip}" if error.advice else skip) from error


def image_files(paths: Sequence[Path], on_error: OnError) -> ImageFiles:
    """Return the given files, with directories replaced by the images in them.

    Raises:
        ImageError: a file does not exist or is not a file, such as a pipe; with `skip`, only if all
            of them are so.
        InputError: a directory has no images.
    """
    files = ImageFiles(Found(), {} if on_error == "skip" else None)
    for path in paths:
        if is_directory(path):
            files.found.add(find_images(path))
        elif problem := problem_of(path):
            files.found.skipped.append(Skipped(path=str(path), reason=problem))
            if on_error == "fail":
                with files.advising():
                    raise ImageError(problem, name=str(path), advice="give the path of an image")
        else:
            files.paths.append(path)
    if not files.paths and (skipped := files.skipped):
        first = f"{skipped[0].path}: {skipped[0].reason}"
        raise ImageError(f"none of the images can be used, such as {first}")
    return files
