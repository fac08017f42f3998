"""Press Ctrl-C during builds of TensorRT-RTX engines. Run by test_build_progress.py.

    python interrupted_builds.py BUNDLE

Runs in its own process, so that the signal and the native library's reaction affect no other test.
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
    """Check that an interrupt is not reported as a fault of the graph, and that a second build
    succeeds."""
    graph, handler = graph_of(bundle, "image", "fp16"), signal.getsignal(signal.SIGINT)
    for calls in (1, 20):
        with pytest.raises(KeyboardInterrupt):
            built(graph, progress=after(calls, ctrl_c))
        assert signal.getsignal(signal.SIGINT) is handler
    assert built(graph)[0]


def between_two_steps(bundle):
    """Send the signal from the library's callback, before any Python line of this project runs."""
    timer = threading.Timer(0.01, ctrl_c)

    def interrupted():
        built(graph_of(bundle, "text", "int8"), progress=after(1, timer.start))
        timer.join()
        time.sleep(0.1)  # if the build was faster

    with pytest.raises(KeyboardInterrupt):
        interrupted()


if __name__ == "__main__":
    # A background job of a shell ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    opened = Bundle.open(Path(sys.argv[1]))
    in_a_step(opened)
    between_two_steps(opened)
