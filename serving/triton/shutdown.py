"""Stops a Triton server without losing a request that it has accepted.

On SIGTERM, Triton (2.51) first waits for its HTTP connections to close, and meanwhile still serves
everything, including new requests on open connections. After that, no model accepts a request, not
even from an ensemble or a model that has accepted one: a request between two steps is lost. `stop`
therefore holds a connection open until the server is idle.

Idle connections of clients would make Triton wait until its timeout. Once the server is idle, it is
killed in spite of them.

Triton unloads a Python model when it has no requests left, and ends its processes one after
another, which takes a second each: too long on a machine with many CPUs. `stop` therefore kills the
server once each model has lost its first process. `finalize` does not run in the others.
"""

import http.client
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress

from serving.triton.processes import Stub, wait_until_idle

UNLOAD_S = 3.0
"""Seconds that Triton may take to unload its models."""
_LOOK_S = 0.05
_WAITS_FOR_CONNECTIONS = re.compile(r'"Timeout \d+: Found \d+ HTTP service connections"\s*\Z')


def stop(
    supervisor: subprocess.Popen[bytes],
    server: int,
    address: str,
    seconds: float,
    logged: Callable[[], str],
    stubs: Iterable[Stub],
) -> None:
    """Wait for the requests in flight, then stop the server.

    Args:
        supervisor: its first SIGTERM stops Triton, its second one kills it.
        server: process id of tritonserver.
        address: host:port of its HTTP endpoint.
        seconds: maximum time for the requests.
        logged: returns the log of Triton.
        stubs: processes of its Python models.
    """
    living = [stub for stub in stubs if stub.is_alive()]

    def ended() -> bool:
        return supervisor.poll() is not None

    def unloading() -> bool:
        gone = {stub.model for stub in living if not stub.is_alive()}
        return gone == {stub.model for stub in living}

    end = time.monotonic() + seconds
    with closing(http.client.HTTPConnection(address, timeout=2)) as held:
        with suppress(OSError, http.client.HTTPException):  # the server may have died, or hang
            held.request("GET", "/v2/health/live")
            held.getresponse().read()
        supervisor.terminate()
        wait_until_idle(server, seconds, ended)
    time_to_unload = time.monotonic() + UNLOAD_S
    while not ended() and not unloading() and time.monotonic() < end + UNLOAD_S:
        if time.monotonic() > time_to_unload and _WAITS_FOR_CONNECTIONS.search(logged()):
            break
        time.sleep(_LOOK_S)
    supervisor.terminate()
    supervisor.wait()
