"""Which other files an ONNX graph reads its weights from, found without loading it.

A graph may name any path there (`TensorProto.external_data`, onnx.proto), and whatever runs it
opens that path. So it is looked at before. Only the structure is read, by the rules of
protobuf's wire format: weights are stepped over, and no package is needed that a server lacks.
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
"""Message -> number of a field -> the message in it, as far as tensors can lie in there."""
_FIXED = {1: 8, 5: 4}
"""Wire type -> bytes of its value."""
_VARINT_BYTES = 10


def external_files(graph: Path) -> set[str]:
    """The paths that tensors of an ONNX file say their values are in, as they stand there.

    Raises:
        ValueError: it is no protobuf message.
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
    """A StringStringEntryProto: key, value."""
    texts = {1: "", 2: ""}
    for number, (first, last) in _fields(data, start, end):
        texts[number] = data[first:last].decode("utf-8")
    return texts[1], texts[2]


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Number and bounds of each field that has a length, in the message from `start` to `end`."""
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
            raise ValueError(f"wire type {wire} at byte {at}")
        if at > end:
            raise ValueError(f"a field ends at byte {at}, beyond its message's end at {end}")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for index, byte in enumerate(data[at : min(at + _VARINT_BYTES, end)]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError(f"no number ends at byte {at}")
