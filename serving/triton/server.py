"""Start and stop a real Triton server on a model repository.

    with TritonServer(Path("build/model_repository"), http_port=0, grpc_port=0) as server:
        ...  # server.http_url, server.grpc_url, server.metrics_url

The server is the one that `serving.triton.embedded` finds in a wheel. It is from 2024-10, and every
security bulletin since touches it; so it listens on loopback unless it is told otherwise, and
production runs a container (26.07 or later), to which the client connects.

This module knows nothing of CLIP.
"""

import http.client
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from serving.errors import ServerError
from serving.triton import shutdown, supervisor
from serving.triton.embedded import VERSION, Embedded, find_embedded
from serving.triton.network import (
    ADMIN_APIS,
    HOST,
    Exposure,
    Ports,
    ServerTls,
    check_key,
    choose_ports,
    port_error,
)
from serving.triton.processes import has_ended, stubs_of
from serving.triton_models.admission import METRICS

EXIT_TIMEOUT_S = 25  # for requests in flight when the server is told to stop
MAX_REQUEST_BYTES = 64 << 20
LOOK_S = 0.05  # how often we look whether the server is ready
SILENCE_S = 60.0  # without an answer to "live?" until a server that runs counts as dead
# A line of Triton's log at level E, `E1120 19:03:06.203810 4365 main.cc:245] "message"`, without
# the quotes where gRPC wrote it; and protobuf's and main's own, on a configuration or a flag.
_ERROR_LINE = re.compile(
    r'^(?:E\d{4} \S+ +\d+ \S+\] +"?(.+?) *"?|(\[libprotobuf ERROR .+|error: .+))$', re.MULTILINE
)
_LOAD_FAILURE = re.compile(r"failed to load '|Poll failed ")
# A race of the Python backend's own while models load ends the whole server, here in one of some
# hundred starts (triton-inference-server/server issues 5949 and 8882); the next start goes well.
_RACE = "boost::interprocess::lock_exception"
_STARTS = 3
_LOST_PORT = re.compile(r"Socket '([\d.]+):(\d+)' already in use")
# Written at level E on every machine without a GPU, the second for each ensemble; and what "failed
# to load" says once more.
_NOISE = (
    "CudaDriverHelper has not been initialized",
    "unable to create stream for ",
    "ERROR: Failed to create instance",
)


def server_flags(
    version: tuple[int, int],
    *,
    repository: Path,
    ports: Ports,
    cache_bytes: int,
    exit_timeout: int,
    key: str,
    exposure: Exposure | None = None,
) -> list[str]:
    """Return the flags for a tritonserver of release `version`, e.g. (2, 51), wherever it lies.

    An unknown flag makes tritonserver exit, so what is newer is given to newer releases only.
    A request to one of ADMIN_APIS must carry the key, see `connection.admin_headers`. Triton takes
    it from its command line only, where other users of the machine can read it.
    """
    restricted = f"{','.join(ADMIN_APIS)}:admin-key={key}"
    flags = [
        f"--model-repository={repository}",
        "--model-control-mode=none",
        *(exposure or Exposure()).flags(ports),
        # AIP_MODE=PREDICTION in the environment would turn all of these round, and Vertex AI's port
        # is on all addresses.
        "--allow-http=true",
        "--allow-grpc=true",
        "--allow-vertex-ai=false",
        "--allow-sagemaker=false",
        "--metrics-config=summary_latencies=true",
        f"--cache-config=local,size={cache_bytes}",
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
        f"--exit-timeout-secs={exit_timeout}",
        "--strict-readiness=true",
        "--disable-auto-complete-config",
    ]
    if version >= (2, 59):  # 25.06; triton-inference-server/server pull request 8174
        flags.append(f"--http-max-input-size={MAX_REQUEST_BYTES}")
    if version >= (2, 68):  # 26.04; pull request 8739
        flags.append("--allow-client-shm=false")
    return flags


def log_errors(text: str) -> list[str]:
    """Return the messages of a Triton log that say why it failed, in order, each once."""
    lines = dict.fromkeys(match[1] or match[2] for match in _ERROR_LINE.finditer(text))
    return [line.replace(r"\n", "\n").strip() for line in lines if not line.startswith(_NOISE)]


class TritonServer:
    """The embedded Triton server, running on `repository` while the context is open.

    Ports are TCP ports, 0 for any free one; `ready_timeout` is in seconds and covers the loading of
    all models; `cache_bytes` is the size of the response cache, for the models whose configuration
    asks for it; `exit_timeout`, in seconds, is for the requests under way when the server is to
    stop; `host` and `tls` are as in `Exposure`; `admin_key` is needed for ADMIN_APIS, by default a
    random one. Entering returns when all models are ready, and raises ServerError when one does not
    load. Leaving finishes what was accepted (see `serving.triton.shutdown`), and stops the server
    and every process of its models; so does the end of this process, whatever its cause (see
    `serving.triton.supervisor`).

    A model.py can import what this environment can, and the package `serving`. It runs in an empty
    working directory, so paths in a repository are to be absolute.

    Entering sets `http_url` and `grpc_url` (with scheme, for clients on this machine),
    `metrics_url` (host:port), `ports`, `exposed` (what is open to other machines, in sentences;
    empty on loopback), `pid` (of tritonserver), `regions` (with which the names of its shared
    memory begin) and `log`, where all output goes, after what is there: by default a new temporary
    file, which is kept.
    """

    http_url: str
    grpc_url: str
    metrics_url: str
    exposed: list[str]
    ports: Ports
    pid: int
    regions: str
    log: Path

    def __init__(
        self,
        repository: Path,
        *,
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        log: Path | None = None,
        ready_timeout: float = 120.0,
        cache_bytes: int = 64 << 20,
        exit_timeout: int = EXIT_TIMEOUT_S,
        host: str = HOST,
        tls: ServerTls | None = None,
        admin_key: str | None = None,
    ) -> None:
        self.repository = repository.resolve()
        self._asked_ports = Ports(http_port, grpc_port, metrics_port)
        self._asked_log = log
        self._ready_timeout = ready_timeout
        self._cache_bytes = cache_bytes
        self._exit_timeout = exit_timeout
        self._exposure = Exposure(host=host, tls=tls)
        self.admin_key = secrets.token_hex(16) if admin_key is None else check_key(admin_key)

    def __enter__(self) -> Self:
        if not self.repository.is_dir():
            raise ServerError(
                f"expected a model repository, a directory; {self.repository} is none. "
                "`clip-deploy assemble` makes one"
            )
        self._exposure.check()
        embedded = find_embedded()
        self.log = self._asked_log or _temporary_log()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Clients are told the name; that of the shared memory is not theirs to know.
        self._name = f"clip-deploy-{secrets.token_hex(8)}"
        self.regions = f"clip-deploy-{secrets.token_hex(8)}"
        for others in reversed(range(_STARTS)):
            self.ports = choose_ports(*self._asked_ports, self._exposure)
            self._supervisor = self._start(embedded)
            try:
                self._read_pid()
                self._wait_until_ready()
                break
            except BaseException as error:  # a Ctrl-C too
                self._abandon()
                if not (others and isinstance(error, ServerError) and self._lost_a_race()):
                    raise
        self.exposed = self._exposure.told(self.ports, VERSION)
        self._stubs, self._answered = stubs_of(self.pid), time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self, patience: float | None = None) -> None:
        """Finish the requests that were accepted, and end; see `serving.triton.shutdown`.

        Args:
            patience: seconds for the requests; default: `exit_timeout`.
        """
        if self._supervisor.poll() is None:
            seconds = self._exit_timeout if patience is None else patience
            address = self.http_url.removeprefix("http://")
            shutdown.stop(self._supervisor, self.pid, address, seconds, self._logged, self._stubs)

    def _abandon(self) -> None:
        """Stop what has not become ready."""
        self._supervisor.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._supervisor.wait(shutdown.UNLOAD_S)
        self._supervisor.terminate()
        self._supervisor.wait()

    def _lost_a_race(self) -> bool:
        """Whether it was chance that the start failed."""
        log = self._logged()
        lost = _LOST_PORT.search(log)
        # A port that is free when it is chosen can be taken, also by a connection of another
        # process to elsewhere, until the models are loaded and Triton listens.
        another_port = lost is not None and int(lost[2]) not in self._asked_ports
        return another_port or _RACE in log

    def fault(self) -> str | None:
        """Why the server does not serve any more, or not all models; None while it does."""
        if has_ended(self.pid):
            with suppress(subprocess.TimeoutExpired):  # which cleans up
                self._supervisor.wait(shutdown.UNLOAD_S)
        status = self._supervisor.poll()
        if status is not None:
            return f"Triton ended by itself (status {status}); its log is {self.log}"
        if _get(self.http_url, "/v2/health/live") is not None:
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > SILENCE_S:
            return f"Triton has not answered for {SILENCE_S:g} s; its log is {self.log}"
        dead = {stub.model for stub in self._stubs if not stub.is_alive()}
        if dead:
            return f"a process of {', '.join(sorted(dead))} died; the log is {self.log}"
        return None

    def _start(self, embedded: Embedded) -> subprocess.Popen[bytes]:
        self.http_url, self.grpc_url = self._exposure.urls(self.ports)
        self.metrics_url = f"{HOST}:{self.ports.metrics}"
        scratch = Path(tempfile.mkdtemp(prefix="clip-deploy-triton-"))  # the supervisor removes it
        flags = server_flags(
            VERSION,
            repository=self.repository,
            ports=self.ports,
            cache_bytes=self._cache_bytes,
            exit_timeout=self._exit_timeout,
            key=self.admin_key,
            exposure=self._exposure,
        )
        flags += embedded.lay_out(scratch)
        flags += [
            f"--id={self._name}",
            f"--backend-config=python,shm-region-prefix-name={self.regions}",
        ]
        command = [sys.executable, "-I", "-S", supervisor.__file__]
        command += [str(os.getpid()), str(self._exit_timeout + shutdown.UNLOAD_S)]
        command += [str(scratch), self.regions]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            return subprocess.Popen(
                [*command, str(embedded.binary), *flags],
                cwd=scratch,  # a stub has its working directory first on sys.path
                env=embedded.environment() | {METRICS: self.metrics_url},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C reaches us alone, and we stop the server
            )

    def _read_pid(self) -> None:
        assert self._supervisor.stdout is not None  # since it is a pipe
        with self._supervisor.stdout as pipe:
            line = pipe.readline()
        if not line:
            raise self._failure("Triton could not be executed")
        self.pid = int(line)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout
        while not self._is_ready():
            ended = self._supervisor.poll() is not None  # before reading, so that we read all
            text = self._logged()
            if (port := _LOST_PORT.search(text)) is not None:
                raise port_error(
                    port[1], int(port[2]), "it was taken while the models were loading"
                )
            if ended or any(map(_LOAD_FAILURE.match, log_errors(text))):
                raise self._failure("Triton did not start")
            if time.monotonic() > deadline:
                raise self._failure(f"Triton was not ready within {self._ready_timeout:g} s")
            time.sleep(LOOK_S)

    def _is_ready(self) -> bool:
        # The name tells our server from another one that took the port before it.
        return (
            self._name.encode() in (_get(self.http_url, "/v2") or b"")
            and _get(self.http_url, "/v2/health/ready") is not None
            and _get(self.metrics_url, "/metrics") is not None
        )

    def _failure(self, what: str) -> ServerError:
        told = log_errors(self._logged())
        reasons = "".join(f"\n{line}" for line in told)
        return ServerError(f"{what} on {self.repository}; its log is {self.log}{reasons}")

    def _logged(self) -> str:
        """What this server has written to its log, which may hold another's before."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="clip-deploy-triton-", suffix=".log")
    os.close(handle)
    return Path(name)


def _get(server: str, path: str) -> bytes | None:
    """Return the body of an answer with status 200, and None for all else."""
    address = server.removeprefix("http://")
    with closing(http.client.HTTPConnection(address, timeout=2)) as connection:
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
    return body if response.status == 200 else None
