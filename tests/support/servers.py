"""Servers under test: their metrics, processes and repositories, and bad images to send."""

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(index: int, form: str = "JPEG", size: tuple[int, int] = (64, 48)) -> bytes:
    rng = np.random.default_rng(index)
    grid = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    buffer = io.BytesIO()
    grid.resize(size, Image.Resampling.BICUBIC).save(buffer, form)
    return buffer.getvalue()


def metric(server, name: str, model: str) -> float:
    """Read a counter once it stops changing: Triton counts an inference after answering it."""
    value, last = counted(server, name, model), -1.0
    while value != last:
        time.sleep(0.1)
        value, last = counted(server, name, model), value
    return value


def counted(server, name: str, model: str) -> float:
    from urllib.request import urlopen

    with urlopen(f"http://{server.metrics_url}/metrics") as response:
        text = response.read().decode()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(name + "{") and f'model="{model}"' in line
    )


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixel data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_PICTURES = {
    "text": (b"this is a text file, renamed .jpg", "expected one of JPEG, PNG"),
    "empty": (b"", "got 0 bytes"),
    "truncated": (encoded(3)[:-200], "truncated|incomplete|damaged|broken"),
    "bomb": (png_header(50_000, 50_000), "pixels"),
}


CONFIG = """
backend: "python"
max_batch_size: 8
input [{ name: "TEXT" data_type: TYPE_STRING dims: [1] },
       { name: "PIXELS" data_type: TYPE_UINT8 dims: [-1] }]
output [{ name: "SAME_TEXT" data_type: TYPE_STRING dims: [1] },
        { name: "SAME_PIXELS" data_type: TYPE_UINT8 dims: [-1] }]
"""


def make_repository(root, processes=1, **models):
    for name, source in models.items():
        (root / name / "1").mkdir(parents=True)
        group = f"instance_group [{{ kind: KIND_CPU count: {processes} }}]\n"
        (root / name / "config.pbtxt").write_text(CONFIG + group)
        (root / name / "1" / "model.py").write_text(source)
    return root


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def processes(server):
    """Return the ids of the processes that run the server's models."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            ours = os.getpgid(int(path.name)) == os.getpgid(server.pid)
            if ours and b"triton_python_backend_stub" in (path / "cmdline").read_bytes():
                found.add(int(path.name))
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found
