"""Starts and stops the embedded Triton server on a model repository.

    with TritonServer(Path("build/model_repository"), http_port=0, grpc_port=0) as server:
        ...  # server.http_url, server.grpc_url, server.metrics_url

`serving.triton.embedded` locates the server in a wheel. That release is from 2024-10 and affected
by all later security bulletins, so it listens on loopback by default. In production, run a Triton
container (26.07 or later) and connect the client to it.

This module does not depend on CLIP.
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

from serving.errors import InputError, ServerError
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
from serving.util.files import check_file
from serving.util.finite import check_positive

EXIT_TIMEOUT_S = 25  # for requests in flight when the server is stopped
MAX_REQUEST_BYTES = 64 << 20
LOOK_S = 0.05  # interval between readiness checks
SILENCE_S = 60.0  # a running server counts as dead if /v2/health/live does not answer for this long
# A line of Triton's log at level E, `E1120 19:03:06.203810 4365 main.cc:245] "message"`; lines from
# gRPC have no quotes. Also the formats of protobuf and of main, for a bad configuration or flag.
_ERROR_LINE = re.compile(
    r'^(?:E\d{4} \S+ +\d+ \S+\] +"?(.+?) *"?|(\[libprotobuf ERROR .+|error: .+))$', re.MULTILINE
)
_LOAD_FAILURE = re.compile(r"failed to load '|Poll failed ")
# A race in the Python backend while models load ends the whole server, here in about one of a
# hundred starts (triton-inference-server/server issues 5949 and 8882); the next start succeeds.
_RACE = "boost::interprocess::lock_exception"
_STARTS = 3
_LOST_PORT = re.compile(r"Socket '([\d.]+):(\d+)' already in use")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]+")
# Logged at level E but not a cause: the first two appear on every machine without a GPU (the second
# for each ensemble), the third repeats a "failed to load" line.
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
    """Return the flags for a tritonserver of release `version`, such as (2, 51).

    tritonserver exits on an unknown flag, so newer flags are passed to newer releases only. A
    request to one of ADMIN_APIS must carry the key; see `serving.clients.endpoint.admin_headers`.
    Triton accepts the key on its command line only, where other users of the machine can read it.
    """
    restricted = f"{','.join(ADMIN_APIS)}:admin-key={key}"
    flags = [
        f"--model-repository={repository}",
        "--model-control-mode=none",
        *(exposure or Exposure()).flags(ports),
        # AIP_MODE=PREDICTION in the environment would invert these defaults, and the port for
        # Vertex AI listens on all addresses.
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
    """Return the error messages of a Triton log in order, without duplicates and known noise."""
    lines = dict.fromkeys(match[1] or match[2] for match in _ERROR_LINE.finditer(text))
    return [line.replace(r"\n", "\n").strip() for line in lines if not line.startswith(_NOISE)]


class TritonServer:
    """The embedded Triton server, running on `repository` while the context is open.

    Entering the context returns when all models are ready. Leaving it finishes the accepted
    requests (see `serving.triton.shutdown`), then stops the server and every process of its models.
    These are also stopped when this process ends for any reason (see `serving.triton.supervisor`).

    A model.py can import the package `serving` and everything that is installed in this
    environment. It runs in an empty working directory, so paths in a repository must be absolute.

    Args:
        http_port, grpc_port, metrics_port: TCP ports; 0 chooses a free one.
        log: file that all output is appended to. Default: a new temporary file, which is kept.
        ready_timeout: seconds until all models must be loaded.
        cache_bytes: size of the response cache, for models whose configuration enables it.
        exit_timeout: seconds for the requests in flight when the server is stopped.
        host, tls: see `Exposure`.
        admin_key: key that ADMIN_APIS require. Default: a random key.

    Raises:
        InputError: on entering, if the log is not a regular file that can be written, or a port,
            the host or the TLS files cannot be used.
        ServerError: on entering, if the server cannot be started or a model does not load.

    Attributes set on entering:
        http_url, grpc_url: URLs with scheme, for clients on this machine.
        metrics_url: host:port.
        ports: the chosen ports.
        exposed: sentences about what other machines can reach; empty on loopback.
        pid: process id of tritonserver.
        regions: prefix of the names of its shared memory regions.
        log: the log file.
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
        check_positive("ready_timeout", ready_timeout)
        self.repository = repository.resolve()
        self._requested_ports = Ports(http_port, grpc_port, metrics_port)
        self._requested_log = log
        self._ready_timeout = ready_timeout
        self._cache_bytes = cache_bytes
        self._exit_timeout = exit_timeout
        self._exposure = Exposure(host=host, tls=tls)
        self.admin_key = secrets.token_hex(16) if admin_key is None else check_key(admin_key)

    def __enter__(self) -> Self:
        if not self.repository.is_dir():
            raise ServerError(
                f"expected a model repository, but {self.repository} is not a directory",
                advice="create one with `clip-deploy assemble`",
            )
        self._exposure.check()
        embedded = find_embedded()
        self.log = self._requested_log or _temporary_log()
        _check_log(self.log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Clients can read the server name; the name of the shared memory stays secret.
        self._name = f"clip-deploy-{secrets.token_hex(8)}"
        self.regions = f"clip-deploy-{secrets.token_hex(8)}"
        for retries_left in reversed(range(_STARTS)):
            self.ports = choose_ports(*self._requested_ports, self._exposure)
            self._supervisor = self._start(embedded)
            try:
                self._read_pid()
                self._wait_until_ready()
                break
            except BaseException as error:  # also KeyboardInterrupt
                self._abandon()
                failed = isinstance(error, ServerError)
                if not (retries_left and failed and self._failed_by_chance()):
                    raise
        self.exposed = self._exposure.describe(self.ports, VERSION)
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
        """Finish the accepted requests and stop the server; see `serving.triton.shutdown`.

        Args:
            patience: seconds for the requests. Default: `exit_timeout`.
        """
        if self._supervisor.poll() is None:
            seconds = self._exit_timeout if patience is None else patience
            address = self.http_url.removeprefix("http://")
            shutdown.stop(self._supervisor, self.pid, address, seconds, self._logged, self._stubs)

    def _abandon(self) -> None:
        """Stop a server that did not become ready."""
        self._supervisor.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._supervisor.wait(shutdown.UNLOAD_S)
        self._supervisor.terminate()
        self._supervisor.wait()

    def _failed_by_chance(self) -> bool:
        """Return whether the start failed because of a race, so that another one may succeed."""
        log = self._logged()
        lost = _LOST_PORT.search(log)
        # Another process can take a chosen port, also for an outgoing connection, before the models
        # are loaded and Triton listens on it.
        another_port = lost is not None and int(lost[2]) not in self._requested_ports
        return another_port or _RACE in log

    def fault(self) -> str | None:
        """Return why the server no longer serves all models; None while it does."""
        if has_ended(self.pid):
            with suppress(subprocess.TimeoutExpired):  # the supervisor cleans up
                self._supervisor.wait(shutdown.UNLOAD_S)
        status = self._supervisor.poll()
        if status is not None:
            return f"Triton ended unexpectedly (status {status}); its log is {self.log}"
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
        scratch = _scratch()
        self._served = self.repository
        if not _PLAIN_PATH.fullmatch(str(self.repository)):
            # The Python backend inserts the path into a shell command without quotes, and the
            # interpreter in its stub expects ASCII.
            self._served = scratch / "repository"
            self._served.symlink_to(self.repository)
        flags = server_flags(
            VERSION,
            repository=self._served,
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
                cwd=scratch,  # the working directory comes first on the sys.path of a stub
                env=embedded.environment() | {METRICS: self.metrics_url},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process only, which stops the server
            )

    def _read_pid(self) -> None:
        assert self._supervisor.stdout is not None
        with self._supervisor.stdout as pipe:
            line = pipe.readline()
        if not line:
            raise self._failure("Triton could not be executed")
        self.pid = int(line)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout
        while not self._is_ready():
            ended = self._supervisor.poll() is not None  # polled first: the log is then complete
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
        # The name distinguishes this server from another one that took the port first.
        return (
            self._name.encode() in (_get(self.http_url, "/v2") or b"")
            and _get(self.http_url, "/v2/health/ready") is not None
            and _get(self.metrics_url, "/metrics") is not None
        )

    def _failure(self, what: str) -> ServerError:
        log = self._logged().replace(str(self._served), str(self.repository))
        reasons = "".join(f"\n{line}" for line in log_errors(log))
        return ServerError(f"{what} on {self.repository}; its log is {self.log}{reasons}")

    def _logged(self) -> str:
        """Return what this server has written to its log; the file may contain older output."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")


def _scratch() -> Path:
    """Return a new directory, which the supervisor removes, at a path that needs no quotes."""
    safe = _PLAIN_PATH.fullmatch(tempfile.gettempdir())
    directory = None if safe else "/tmp"
    return Path(tempfile.mkdtemp(prefix="clip-deploy-triton-", dir=directory))


def _check_log(log: Path) -> None:
    check_file(log)
    if log.exists() and not log.is_file():
        raise InputError(
            f"the log {log} is a device or a pipe; expected a file, which is also read",
            advice="give the path of a file",
        )


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="clip-deploy-triton-", suffix=".log")
    os.close(handle)
    return Path(name)


def _get(server: str, path: str) -> bytes | None:
    """Return the body of a response with status 200, else None."""
    address = server.removeprefix("http://")
    with closing(http.client.HTTPConnection(address, timeout=2)) as connection:
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
    return body if response.status == 200 else None
