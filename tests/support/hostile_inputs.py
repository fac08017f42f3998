"""Images and texts at the limits of `serving.limits` that take as long as possible to process."""

import struct
import zlib

import numpy as np
from PIL import Image

from serving.limits import MAX_LINES, MAX_PARTS, MAX_SCANS, MAX_TEXT_BYTES, MAX_WORD
from tests.support.fuzzing import bmp_rle, encoded


def png_chunk(kind, content=b""):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_with(chunks, image=None, after=False):
    """A PNG with `chunks` before or after its data."""
    data = encoded(image or Image.new("L", (8, 8)), "PNG")
    at = data.index(b"IEND" if after else b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


def chunks_of(data):
    """Number of chunks of a PNG."""
    count, at = 0, 8
    while at < len(data):
        at += 12 + struct.unpack_from(">I", data, at)[0]
        count += 1
    return count


def padded(data, size):
    """`data` followed by zeros, `size` bytes in total."""
    return data + bytes(size - len(data))


def jpeg_with(segments, image=None):
    """A JPEG that starts with `segments`, pairs of marker and content."""
    data = encoded(image or Image.new("RGB", (16, 16), "red"), "JPEG")
    extra = b"".join(
        struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
        for marker, content in segments
    )
    return data[:2] + extra + data[2:]


def markers_of(data):
    """Number of markers of a JPEG without restarts."""
    count, at = 0, 0
    while True:
        at = data.index(b"\xff", at)
        marker = data[at + 1]
        at += 1
        if marker in (0, 0xFF):
            continue
        count += marker != 0xD8
        if marker == 0xD9:
            return count
        if marker != 0xD8:
            at += 1 + struct.unpack_from(">H", data, at + 1)[0]


def jpeg_with_scans(scans, image=None):
    """A progressive JPEG with `scans` scans. The last one, over all pixels, is repeated."""
    data = encoded(image or Image.new("RGB", (16, 16), "red"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (scans - data.count(b"\xff\xda")) + data[-2:]


def jpeg_tables(size):
    """A JPEG with `size` bytes of tables before its first scan, counted like `serving`."""
    plain = encoded(Image.new("RGB", (16, 16), "red"), "JPEG")
    missing = size - (plain.index(b"\xff\xda") - 2)
    table = struct.pack(">BBHB", 0xFF, 0xDB, 67, 3) + bytes(range(1, 65))
    tables = table * (missing // len(table) - 1)
    rest = missing - len(tables)
    fill = struct.pack(">BBH", 0xFF, 0xE0, rest - 2) + bytes(rest - 4)
    return plain[:2] + tables + fill + plain[2:]


def gif_with(blocks, size=255, image=None):
    """A GIF with a comment of `blocks` blocks before its frame."""
    data = encoded(image or Image.new("P", (8, 8)), "GIF")
    at = 13 + (6 << (data[10] & 7))
    comment = (bytes([size]) + bytes(range(1, size + 1))) * blocks
    return data[:at] + b"!\xfe" + comment + b"\0" + data[at:]


def bmp_of_single_pixels(side):
    """A run-length encoded BMP whose runs are one pixel long."""
    data = bytearray(bmp_rle(side, side))
    start = struct.unpack_from("<I", data, 10)[0]
    row = bytes(value for x in range(side) for value in (1, x % 251)) + b"\0\0"
    return bytes(data[:start]) + row * side + b"\0\1"


def small_bombs():
    """Map names to images that are small when decoded, but slow for a reader that parses all
    metadata."""
    zeros = zlib.compress(bytes((1 << 20) - 1), 9)
    profile = png_chunk(b"iCCP", b"x\0\0" + zeros)
    text = png_chunk(b"zTXt", b"x\0\0" + zeros)
    most = MAX_PARTS - 3
    return {
        "PNG, 19,997 compressed profiles": png_with([profile] * most),
        "PNG, 19,997 compressed texts": png_with([text] * most, after=True),
        "PNG, 19,997 empty data chunks": png_with([png_chunk(b"IDAT")] * most),
        "JPEG, 31 MB of comments": jpeg_with([(0xFE, bytes(65533))] * 480),
        "JPEG, 31 MB of EXIF": jpeg_with([(0xE1, b"Exif\0\0MM\0*\0\0\0\x08" + bytes(65519))] * 480),
        "JPEG, 31 MB of fill bytes": jpeg_with([])[:2] + b"\xff" * (31 << 20) + jpeg_with([])[2:],
        "JPEG, 31 MB of junk": jpeg_with([])[:20] + b"\xff\0" * (31 << 19) + jpeg_with([])[20:],
        "JPEG, 19,000 segments": jpeg_with([(0xFE, b"")] * 19_000),
        "JPEG, 128 kB of tables": jpeg_tables(128 << 10),
        "JPEG, 50 scans": jpeg_with_scans(MAX_SCANS, Image.new("RGB", (512, 512))),
        "GIF, 19,990 blocks of comment": gif_with(19_990),
        "GIF, 31 MB of junk": gif_with(0)[:13] + bytes(31 << 20) + gif_with(0)[13:],
        "BMP, runs of one pixel": bmp_of_single_pixels(1024),
        "WebP, 1,000 frames": encoded(
            Image.new("RGB", (64, 64)),
            "WEBP",
            save_all=True,
            append_images=[Image.new("RGB", (64, 64), (i % 256, i // 4, 0)) for i in range(1000)],
        ),
        "PNG, 1 x 60,000": encoded(Image.new("RGB", (1, 60_000), "red"), "PNG"),
    }


def large_bombs():
    """Map names to functions that create an image of 64 megapixels."""
    side = 8192

    def image(mode):
        return Image.new(mode, (side, side))

    def png16():
        row = bytes(1 + 8 * side)
        header = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
        packer = zlib.compressobj(9)
        data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            png_chunk(*chunk) for chunk in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
        )

    def noise():
        rng = np.random.default_rng(0)
        grid = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
        return grid.resize((side, side), Image.Resampling.BILINEAR)

    return {
        "JPEG, 50 scans, 64 MP": lambda: jpeg_with_scans(MAX_SCANS, image("RGB")),
        "JPEG, 64 MP": lambda: encoded(noise(), "JPEG"),
        "PNG, RGBA of 16 bits, 64 MP": png16,
        "PNG, RGBA, 64 MP": lambda: encoded(image("RGBA"), "PNG", compress_level=1),
        "GIF, 64 MP": lambda: encoded(image("P"), "GIF"),
        "WebP, 64 MP": lambda: encoded(image("RGB"), "WEBP", method=0),
        "WebP, lossless, 64 MP": lambda: encoded(image("RGBA"), "WEBP", lossless=True, method=0),
        "PNG, 1 x 67,108,864": lambda: encoded(Image.new("L", (1, side * side)), "PNG"),
    }


def slow_texts():
    """Map names to texts within the limits that are slow for some stage."""
    word = MAX_WORD - 1

    def fill(piece, width=word):
        """Repeat `piece` to words of maximum length, up to the maximum text size."""
        one = piece * max(1, width // len(piece))
        size = len(one.encode()) + 1
        return " ".join([one] * max(1, MAX_TEXT_BYTES // size))

    lines = "\n".join([fill("é", 20)[:40]] * (MAX_LINES - 1))
    return {
        "one letter": fill("x"),
        "letters of no merge": fill("qxzj"),
        "combining marks": fill("a" + "\u0301\u0316" * ((word - 1) // 2)),
        "marks in falling order": fill("a" + "\u0345\u0301\u0323\u0334" * ((word - 1) // 4)),
        "marks behind control characters": ("\u0301\u0316" * 450 + "\x0b") * 4 + "a",
        "nested entities": fill("&" + "amp;" * 7 + " ", 30),
        "entities": fill("&#38;"),
        "entities of two characters": fill("&NotEqualTilde;"),
        "ampersands": fill("&notit"),
        "mojibake": fill("Ã¯Â¿Â½"),
        "mojibake of mojibake": fill("ÃƒÂ¯Ã‚Â¿Ã‚Â½"),
        "euro signs": fill("â‚¬"),
        "lines": lines[: MAX_TEXT_BYTES // 2],
        "emoji": fill("🏳️‍🌈"),
        "Hangul": fill("각"),
        "dotted I": fill("İ"),
        "punctuation": fill("'!?&"),
        "apostrophes": fill("'s'll"),
        "ligatures": fill("ﬃ", 300),
        "fullwidth": fill("＆ａｍｐ；"),
        "spaces": "a" + " " * (MAX_TEXT_BYTES - 2) + "a",
        "terminal escapes": fill("\x1b[31;31;31"),
    }
