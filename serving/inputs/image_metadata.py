"""Strip metadata from encoded images before they reach a decoder.

Pillow parses metadata (EXIF, color profiles, comments, private chunks) part by part in Python, and
decompresses some of it. A file within the size limit can keep it busy for minutes. Since no pixel
depends on metadata, it is removed without being parsed. The parts that remain are counted and
limited. Pixels do not change: tests compare them with Pillow's result for the whole file.
`orientation` reads the one value of the metadata that can be asked for.

WebP and BMP are returned unchanged: WebP is parsed in C, and a BMP has a header of fixed size.
"""

import re
import struct
from typing import Literal

from serving.errors import ImageError
from serving.limits import MAX_JPEG_HEADER_BYTES, MAX_PARTS, MAX_SCANS

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND")

# Excludes stuffed bytes of coded data (ff 00), fill bytes (ff ff) and restarts (ff d0 to d7).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP14, _APP15 = 0xE0, 0xEE, 0xEF  # APP0 and APP14 declare the color space

_JUNK = 64 << 10  # maximum bytes to search in a header for its next part

_EXIF = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
_MAX_ENTRIES = 1_000  # of the EXIF directory that are searched for the orientation; 30 are common

_GIF_HEADER = 13  # size in bytes; the palette follows
_GIF_BLOCK = re.compile(rb"[!,;]")  # extension, image, end of file


def pixel_parts(data: bytes) -> bytes:
    """Return a JPEG, PNG or GIF without the parts that its pixels do not depend on.

    Raises:
        ImageError: the image has more than `MAX_PARTS` parts, or is a JPEG with more than
            `MAX_SCANS` scans or `MAX_JPEG_HEADER_BYTES` bytes of tables.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(_PNG_MAGIC):
        return _png(data)
    if data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= _GIF_HEADER:
        return _gif(data)
    return data


def _jpeg(data: bytes) -> bytes:
    """Drop application segments, comments and junk before the first scan, and all after the end."""
    view, at, header, first_scan, scans = memoryview(data), 2, 0, 0, 0
    kept = [view[:at]]
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, at, len(data) if scans else at + _JUNK)
        if found is None:  # truncated; the decoder reports it
            return b"".join([*kept, view[first_scan:]] if scans else kept)
        start, marker = found.start(), data[found.start() + 1]
        at = start + 2
        if _has_length(marker):
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
        if marker == _EOI and scans:
            return b"".join([*kept, view[first_scan:at]])
        if marker == _SOS:
            first_scan, scans = first_scan or start, scans + 1
        if not scans and (not _APP0 < marker <= _APP15 or marker == _APP14) and marker != _COM:
            kept.append(view[start:at])
            header += len(kept[-1])
        if scans > MAX_SCANS:
            raise ImageError(
                f"the JPEG has more than the {MAX_SCANS} scans allowed",
                advice="save it again as a baseline JPEG, not a progressive one",
            )
        if header > MAX_JPEG_HEADER_BYTES:
            raise ImageError(
                f"the JPEG has {header} bytes of tables before its first scan, more than the "
                f"{MAX_JPEG_HEADER_BYTES} allowed",
                advice="save it again",
            )
    raise _too_many("JPEG", "segments")


def _has_length(marker: int) -> bool:
    """Return whether Pillow reads a length after a marker (`JpegImagePlugin.MARKER`)."""
    return marker >= 0xC0 and marker not in (_SOI, _EOI, 0xC8) and not 0xF0 <= marker <= 0xFD


def _png(data: bytes) -> bytes:
    """Keep only critical chunks, and transparency if it precedes the image data."""
    view, at, in_data = memoryview(data), len(_PNG_MAGIC), False
    kept = [view[:at]]
    for _ in range(MAX_PARTS):
        name = data[at + 4 : at + 8]
        if len(name) < 4 or not name.isalpha():
            kept.append(view[at:])  # truncated or damaged; the decoder reports it
            return b"".join(kept)
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        in_data = in_data or name == b"IDAT"
        if name in _PNG_KEPT or (name == b"tRNS" and not in_data):
            kept.append(view[at:end])
        if name == b"IEND":
            return b"".join(kept)
        at = end
    raise _too_many("PNG", "chunks")


def _gif(data: bytes) -> bytes:
    """Drop all extensions before the first frame, except those that control its transparency."""
    view, flags = memoryview(data), data[10]
    at = _GIF_HEADER + (6 << (flags & 7) if flags & 0x80 else 0)
    kept, parts = [view[:at]], 0
    while found := _GIF_BLOCK.search(data, at, at + _JUNK):
        start = found.start()
        if found[0] == b",":
            kept.append(view[start:])
            break
        if found[0] == b";":
            break  # no image; the decoder reports it
        at = start + 2  # after the extension's label
        while True:
            size = data[at] if at < len(data) else 0
            at += 1 + size
            parts += 1
            if parts > MAX_PARTS:
                raise _too_many("GIF", "blocks before its first frame")
            if not size:
                break
        if data[start + 1 : start + 2] == b"\xf9":  # graphic control: transparency
            kept.append(view[start:at])
    return b"".join(kept)


def _too_many(kind: str, parts: str) -> ImageError:
    return ImageError(
        f"the {kind} has more than the {MAX_PARTS} {parts} allowed",
        advice="save it again without metadata",
    )


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG, PNG or WebP, 1 to 8; 1 if there is none.

    Reads the first EXIF block and nothing else: no XMP, and no text chunks of a PNG.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            block = _jpeg_exif(data)
        elif data.startswith(_PNG_MAGIC):
            block = _chunk(data, len(_PNG_MAGIC), b"eXIf", "big", before=4, extra=12, align=1)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            block = _chunk(data, 12, b"EXIF", "little", before=0, extra=8, align=2)
        else:
            return 1
        return _orientation_of(block)
    except struct.error:  # truncated
        return 1


def _jpeg_exif(data: bytes) -> bytes:
    at = 2
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, at, at + _JUNK)
        if found is None or data[found.start() + 1] in (_SOS, _EOI):
            break
        marker, at = data[found.start() + 1], found.start() + 2
        if not _has_length(marker):
            continue
        end = at + max(2, int.from_bytes(data[at : at + 2], "big"))
        if marker == _APP0 + 1 and data[at + 2 : at + 8] == _EXIF:
            return data[at + 2 : end]
        at = end
    return b""


def _chunk(
    data: bytes,
    at: int,
    name: bytes,
    order: Literal["big", "little"],
    *,
    before: int,
    extra: int,
    align: int,
) -> bytes:
    """Return the content of the first chunk `name` of a PNG or a RIFF file.

    Args:
        data: the file.
        at: offset of its first chunk.
        name: four bytes.
        order: byte order of a chunk's size.
        before: offset of the name in a chunk; the size is in the other four bytes of the head.
        extra: bytes of a chunk beside its content.
        align: chunks begin at multiples of this many bytes.
    """
    for _ in range(MAX_PARTS):
        head = data[at : at + 8]
        if len(head) < 8:
            break
        size = int.from_bytes(head[4 - before : 8 - before], order)
        if head[before : before + 4] == name:
            return data[at + 8 : at + 8 + size]
        at += extra + size + -size % align
    return b""


def _orientation_of(block: bytes) -> int:
    """Return the orientation in the first directory of an EXIF block, which is a TIFF file."""
    tiff = block.removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(min(count, _MAX_ENTRIES)):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
        if tag == _ORIENTATION_TAG:
            return value if kind == 3 and 1 <= value <= 8 else 1  # 3: unsigned 16-bit integer
    return 1
