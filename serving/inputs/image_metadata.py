"""An encoded picture without the parts that only describe it, before a decoder sees it.

Pillow reads what a file says of itself (EXIF, profiles, comments, private chunks) part by part, in
Python, and unpacks some of it: a file of an allowed size can keep it busy for minutes. No pixel
depends on that, so it is cut out unread; what takes long even so is counted and refused. Pixels
stay the same: tests compare them with what Pillow makes of the whole file.

WebP and BMP come back as they are: the one is read in C, the other has a header of fixed size.
"""

import re

from serving.errors import ImageError
from serving.limits import MAX_JPEG_HEADER_BYTES, MAX_PARTS, MAX_SCANS

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND")

# Not a byte of coded data (ff 00), a fill byte (ff ff) or a restart (ff d0 to d7).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP14, _APP15 = 0xE0, 0xEE, 0xEF  # the first two tell the colour space

_JUNK = 64 << 10  # bytes of a header that are looked through for what comes next

_GIF_HEADER = 13  # bytes, before the palette
_GIF_BLOCK = re.compile(rb"[!,;]")  # an extension, an image, the end


def pixel_parts(data: bytes) -> bytes:
    """Cuts out of a JPEG, PNG or GIF what its pixels do not depend on.

    Raises:
        ImageError: it has more than `MAX_PARTS`, or, a JPEG, more than `MAX_SCANS` or
            `MAX_JPEG_HEADER_BYTES`.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(_PNG_MAGIC):
        return _png(data)
    if data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= _GIF_HEADER:
        return _gif(data)
    return data


def _jpeg(data: bytes) -> bytes:
    """Up to the end of the image, in front without application segments, comments and junk."""
    view, at, header, first_scan, scans = memoryview(data), 2, 0, 0, 0
    kept = [view[:at]]
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, at, len(data) if scans else at + _JUNK)
        if found is None:  # cut off, as the decoder will say
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
                f"the JPEG has more than the {MAX_SCANS} scans allowed; save it again, not "
                "progressive"
            )
        if header > MAX_JPEG_HEADER_BYTES:
            raise ImageError(
                f"the JPEG has {header} bytes of tables before its first scan, more than the "
                f"{MAX_JPEG_HEADER_BYTES} allowed; save it again"
            )
    raise ImageError(_too_many("JPEG", "segments"))


def _has_length(marker: int) -> bool:
    """Whether a length follows a marker, as Pillow reads it (`JpegImagePlugin.MARKER`)."""
    return marker >= 0xC0 and marker not in (_SOI, _EOI, 0xC8) and not 0xF0 <= marker <= 0xFD


def _png(data: bytes) -> bytes:
    """The critical chunks, and transparency, which must come before the data."""
    view, at, in_data = memoryview(data), len(_PNG_MAGIC), False
    kept = [view[:at]]
    for _ in range(MAX_PARTS):
        name = data[at + 4 : at + 8]
        if len(name) < 4 or not name.isalpha():
            kept.append(view[at:])  # cut off or damaged, as the decoder will say
            return b"".join(kept)
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        in_data = in_data or name == b"IDAT"
        if name in _PNG_KEPT or (name == b"tRNS" and not in_data):
            kept.append(view[at:end])
        if name == b"IEND":
            return b"".join(kept)
        at = end
    raise ImageError(_too_many("PNG", "chunks"))


def _gif(data: bytes) -> bytes:
    """The palette, what is said of the first frame, and all from there."""
    view, flags = memoryview(data), data[10]
    at = _GIF_HEADER + (6 << (flags & 7) if flags & 0x80 else 0)
    kept, parts = [view[:at]], 0
    while found := _GIF_BLOCK.search(data, at, at + _JUNK):
        start = found.start()
        if found[0] == b",":
            kept.append(view[start:])
            break
        if found[0] == b";":
            break  # no image, as the decoder will say
        at = start + 2  # after the extension's label
        while True:
            size = data[at] if at < len(data) else 0
            at += 1 + size
            parts += 1
            if parts > MAX_PARTS:
                raise ImageError(_too_many("GIF", "blocks before its first frame"))
            if not size:
                break
        if data[start + 1 : start + 2] == b"\xf9":  # graphic control: transparency
            kept.append(view[start:at])
    return b"".join(kept)


def _too_many(kind: str, parts: str) -> str:
    return f"the {kind} has more than the {MAX_PARTS} {parts} allowed; save it again, plainly"
