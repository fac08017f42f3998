"""Clients in forked processes: gunicorn's `preload_app`, DataLoader workers, `multiprocessing`.

A child process has none of its parent's threads, and shares its connections.

- HTTP: tritonclient uses gevent, whose event loop and resolver threads do not survive a fork, so
  that even a new client would wait forever. `gevent.reinit` repairs them in the child.
- gRPC: its C core cannot be used again reliably. With grpcio 1.85, 2 of 60 children that were
  forked while other threads called gRPC crashed, and others lost the first request. A child of a
  process that used gRPC therefore gets an error at once.
"""

import os
import weakref
from typing import Literal, Protocol

from serving.errors import ServerError

_grpc: Literal["unused", "used", "forked"] = "unused"
_http_prepared = False


class Forkable(Protocol):
    """Object with threads or connections."""

    def after_fork(self) -> None:
        """Replace what a child process cannot use. Called in the child."""


_watched: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(forkable: Forkable) -> None:
    """Call `after_fork` of an object in every child process, as long as the object exists."""
    _watched.add(forkable)


def prepare(protocol: Literal["grpc", "http"]) -> None:
    """Record that this process is about to use the library of `protocol`.

    Raises:
        ServerError: the library does not work because this process was forked.
    """
    global _grpc, _http_prepared
    if protocol == "grpc":
        if _grpc == "forked":
            raise ServerError(
                "gRPC does not work in this process, because it was forked from one that used gRPC",
                advice="create the client in the forked process with an http:// URL, or start "
                "processes by multiprocessing's 'spawn' method",
            )
        _grpc = "used"
    elif not _http_prepared:
        import gevent

        os.register_at_fork(after_in_child=gevent.reinit)  # does nothing without an event loop
        _http_prepared = True


def _in_child() -> None:
    global _grpc
    if _grpc == "used":
        _grpc = "forked"
    for forkable in list(_watched):
        forkable.after_fork()


os.register_at_fork(after_in_child=_in_child)
