"""Find the files that an ONNX graph reads its weights from, without loading the graph.

A graph may name any path as external data (`TensorProto.external_data` in onnx.proto), and a
runtime opens that path when it loads the graph. The paths are therefore checked before. This module
parses only the structure of protobuf's wire format: it skips over weights, and it needs no package
that is missing on a server, such as onnx.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Message -> field number -> message of that field, for all fields that can contain tensors."""
_FIXED = {1: 8, 5: 4}
"""Wire type -> size of its value in bytes."""
_VARINT_BYTES = 10


def external_files(graph: Path) -> set[str]:
    """Return the external data paths of all tensors in an ONNX file, exactly as written there.

    Raises:
        ValueError: the file is not a protobuf message.
    """
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found: set[str] = set()
        waiting = [("model", 0, len(data))]
        while waiting:
            message, start, end = waiting.pop()
            for number, value in _fields(data, start, end):
                inside = _INSIDE[message].get(number)
                if inside == "entry":
                    key, path = _entry(data, *value)
                    if key == "location":
                        found.add(path)
                elif inside is not None:
                    waiting.append((inside, *value))
        return found


def _entry(data: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    """Return key and value of a StringStringEntryProto."""
    texts = {1: "", 2: ""}
    for number, (first, last) in _fields(data, start, end):
        texts[number] = data[first:last].decode("utf-8")
    return texts[1], texts[2]


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield number and bounds of each length-delimited field of the message at `start` to `end`."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = _varint(data, at, end)
        elif wire in _FIXED:
            at += _FIXED[wire]
        elif wire == 2:
            length, at = _varint(data, at, end)
            yield number, (at, at + length)
            at += length
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        if at > end:
            raise ValueError(f"a field ends at byte {at}, beyond the end of its message at {end}")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """Return a varint and the offset behind it."""
    value = 0
    for index, byte in enumerate(data[at : min(at + _VARINT_BYTES, end)]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError(f"the varint at byte {at} does not end")
