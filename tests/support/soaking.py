"""Mixed traffic to a server, and measurements of its memory, files and processes meanwhile."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from benchmarks.load.workload import mixed_pictures, mixed_texts
from serving.bundles.bundle import Bundle
from serving.clients.triton import ClipClient
from serving.errors import ImageError, ServerError, TextError
from serving.triton.server import TritonServer

GROWTH_BYTES = 100e6
"""Maximum growth of memory after the first tenth of the time, during which it settles."""
SLOPE_BYTES = 10e6
"""Maximum rise, over the second half, of a line fitted to that half's samples."""
_EVERY_S = 0.5
_SHARED_MEMORY = Path("/dev/shm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Held:
    """Resources held by the processes of a server."""

    rss_bytes: int
    shared_memory: int
    """Number of entries in /dev/shm."""
    files: int
    """Number of file descriptors."""
    processes: tuple[int, ...]


def held(server: TritonServer) -> Held:
    """Measure tritonserver and the processes of its models, which form one process group."""
    every = tuple(sorted(_group(server.pid)))
    rss = files = 0
    for pid in every:
        with suppress(FileNotFoundError, ProcessLookupError):  # the process ended meanwhile
            rss += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
            files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Held(rss, len(list(_SHARED_MEMORY.glob(f"{server.regions}*"))), files, every)


def _group(leader: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            if os.getpgid(int(entry.name)) == leader:
                yield int(entry.name)


def at_rest(server: TritonServer, expected: Held | None = None, within: float = 15.0) -> Held:
    """Wait at most `within` s until files and shared memory equal `expected` or stop changing.

    Triton closes a connection shortly after its client did.
    """
    end, last = time.monotonic() + within, held(server)
    while time.monotonic() < end:
        time.sleep(1.0)
        last, before = held(server), last
        wanted = expected or before
        if (last.files, last.shared_memory) == (wanted.files, wanted.shared_memory):
            break
    return last


@contextmanager
def watched(server: TritonServer) -> Iterator[list[tuple[float, int]]]:
    """Collect samples (seconds, bytes of memory) of the server while the block runs."""
    samples: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        start = time.monotonic()
        while not over.wait(_EVERY_S):
            samples.append((time.monotonic() - start, held(server).rss_bytes))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def growth(samples: list[tuple[float, int]]) -> tuple[float, float]:
    """Return memory growth in bytes: the maximum after the first tenth of the time, and the fitted
    rise over the second half."""
    times, memory = np.array(samples, np.float64).T
    settled = memory[times >= times[-1] / 10]
    first = np.median(settled[: max(3, len(settled) // 20)])
    half = times >= times[-1] / 2
    slope = np.polyfit(times[half], memory[half], 1)[0]
    return float(settled.max() - first), float(slope * times[-1] / 2)


def leaks(samples: list[tuple[float, int]]) -> bool:
    """Return True if `samples` show that memory grows without bound."""
    grown, risen = growth(samples)
    return grown > GROWTH_BYTES or risen > SLOPE_BYTES


class Traffic:
    """Users of every kind, each a thread, for `seconds`. `answers` counts by kind of user."""

    def __init__(self, server: TritonServer, bundle: Bundle, seconds: float) -> None:
        self._server, self._end = server, time.monotonic() + seconds
        self._pictures = mixed_pictures().items
        self._texts = [item.decode() for item in mixed_texts(bundle, seed=int(time.time())).items]
        self.answers: dict[str, int] = {}
        self.unexpected: list[str] = []

    def run(self) -> None:
        """Run all users until the time is over."""
        users = (
            self._pictures_over_grpc,
            self._pictures_over_http,
            self._texts_over_grpc,
            self._texts_over_http,
            self._labels,
            self._bad_pictures,
            self._bad_texts,
            self._impatient,
            self._strangers,
        )
        threads = [threading.Thread(target=self._repeat, args=(user,)) for user in users]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _repeat(self, user: Callable[[], Iterator[None]]) -> None:
        name = user.__name__.strip("_").replace("_", " ")
        self.answers[name] = 0
        try:
            for _ in user():
                self.answers[name] += 1
                if time.monotonic() > self._end:
                    return
        except Exception as error:
            self.unexpected.append(f"{name}: {error!r}")

    def _pictures_over_grpc(self) -> Iterator[None]:
        yield from self._embed_pictures(self._server.grpc_url)

    def _pictures_over_http(self) -> Iterator[None]:
        yield from self._embed_pictures(self._server.http_url)

    def _embed_pictures(self, url: str) -> Iterator[None]:
        with ClipClient(url) as client:
            for place in itertools.count():
                start = 5 * place % len(self._pictures)
                client.embed_images(self._pictures[start : start + 1 + place % 9])
                yield

    def _texts_over_grpc(self) -> Iterator[None]:
        yield from self._embed_texts(self._server.grpc_url)

    def _texts_over_http(self) -> Iterator[None]:
        yield from self._embed_texts(self._server.http_url)

    def _embed_texts(self, url: str) -> Iterator[None]:
        with ClipClient(url) as client:
            for place in itertools.count():
                start = 7 * place % len(self._texts)
                client.embed_texts(self._texts[start : start + 1 + place % 13])
                yield

    def _labels(self) -> Iterator[None]:
        """Send known and new label sets, more than the cache keeps."""
        with ClipClient(self._server.grpc_url) as client:
            for place in itertools.count():
                labels = [f"thing {place // 3} {index}" for index in range(40)]
                client.classify(self._pictures[:2], labels, ["a {}", "the {}"])
                yield

    def _bad_pictures(self) -> Iterator[None]:
        with ClipClient(self._server.http_url) as client:
            for place in itertools.count():
                whole = self._pictures[place % len(self._pictures)]
                with suppress(ImageError):
                    client.embed_images([whole[: 100 + place * 37 % (len(whole) // 2)]])
                    raise AssertionError("half a picture was embedded")
                yield

    def _bad_texts(self) -> Iterator[None]:
        with ClipClient(self._server.grpc_url) as client:
            for place in itertools.count():
                with suppress(TextError):
                    client.embed_texts(["", "word " * 500, "a\0b"][place % 3 :][:1])
                    raise AssertionError("a bad text was embedded")
                yield

    def _impatient(self) -> Iterator[None]:
        """Disconnect before the answer arrives."""
        with ClipClient(self._server.grpc_url, timeout=0.005) as client:
            for _ in itertools.count():
                with suppress(ServerError):
                    client.embed_images(self._pictures[:2])
                yield
                time.sleep(0.2)

    def _strangers(self) -> Iterator[None]:
        """Connect, request a model that does not exist, and disconnect."""
        address = self._server.grpc_url.partition("://")[2]
        while True:
            with tritonclient.grpc.InferenceServerClient(address) as client:
                tensor = tritonclient.grpc.InferInput("image", [1, 1], "BYTES")
                tensor.set_data_from_numpy(np.array([[b""]], np.object_))
                with suppress(InferenceServerException):
                    client.infer("no_such_model", [tensor])
                    raise AssertionError("a model that is not there answered")
            yield
            time.sleep(0.05)
