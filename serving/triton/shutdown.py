"""How a Triton server is stopped without losing a request that it has accepted.

Told to stop, Triton (2.51) first waits for its HTTP connections to end, and goes on with everything
meanwhile, new requests of old connections included. Then no model takes a request any more, not
even from an ensemble or a model that has accepted one: what is between two steps is lost. So we
hold a connection until the server is idle.

Connections that clients keep without asking anything would make it wait for all of its time. Once
it is idle, it is ended in spite of them.

A Python model is let go when no request is left in it, and then its processes one after another, a
second each: on a machine of many CPUs longer than we may take. So all are ended once each model has
lost its first. The `finalize` of the others is not run.
"""

import http.client
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress

from serving.triton.processes import Stub, wait_until_idle

UNLOAD_S = 3.0
"""For Triton to let its models go, or to be killed."""
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
    """Let requests under way end, then the server.

    Args:
        supervisor: told once, it tells Triton; told twice, it kills it.
        server: process id of tritonserver.
        address: host:port of its HTTP.
        seconds: for the requests, at most.
        logged: returns what Triton wrote.
        stubs: of its Python models.
    """
    living = [stub for stub in stubs if stub.is_alive()]

    def ended() -> bool:
        return supervisor.poll() is not None

    def let_go() -> bool:
        gone = {stub.model for stub in living if not stub.is_alive()}
        return gone == {stub.model for stub in living}

    end = time.monotonic() + seconds
    with closing(http.client.HTTPConnection(address, timeout=2)) as held:
        with suppress(OSError, http.client.HTTPException):  # it may have died, or hang
            held.request("GET", "/v2/health/live")
            held.getresponse().read()
        supervisor.terminate()
        wait_until_idle(server, seconds, ended)
    time_to_unload = time.monotonic() + UNLOAD_S
    while not ended() and not let_go() and time.monotonic() < end + UNLOAD_S:
        if time.monotonic() > time_to_unload and _WAITS_FOR_CONNECTIONS.search(logged()):
            break
        time.sleep(_LOOK_S)
    supervisor.terminate()
    supervisor.wait()
