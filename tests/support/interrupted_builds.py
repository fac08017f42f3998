"""Ctrl-C during builds of TensorRT-RTX plans; run by test_build_progress.py.

    python interrupted_builds.py BUNDLE

In a process of its own: the signal, and what a native library makes of it, is no other test's.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from serving.bundles.bundle import Bundle
from tests.support.engine_builds import after, built, graph_of


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def in_a_step(bundle):
    """And is not taken for a fault of the graph; a second build does as if nothing had been."""
    graph, handler = graph_of(bundle, "image", "fp16"), signal.getsignal(signal.SIGINT)
    for calls in (1, 20):
        with pytest.raises(KeyboardInterrupt):
            built(graph, progress=after(calls, ctrl_c))
        assert signal.getsignal(signal.SIGINT) is handler
    assert built(graph)[0]


def between_two_steps(bundle):
    """Where it would be raised as the library calls back, before any line of ours."""
    timer = threading.Timer(0.01, ctrl_c)

    def interrupted():
        built(graph_of(bundle, "text", "int8"), progress=after(1, timer.start))
        timer.join()
        time.sleep(0.1)  # had the build been faster

    with pytest.raises(KeyboardInterrupt):
        interrupted()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    opened = Bundle.open(Path(sys.argv[1]))
    in_a_step(opened)
    between_two_steps(opened)
