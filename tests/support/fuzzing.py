"""Malformed input made from valid input: mutated images, unusual texts, invalid KServe requests.

Every function takes a `random.Random`, so that Hypothesis can drive it (`st.randoms()`), or a seed
that a failure reports.
"""

import copy
import io
import json
import math
import struct
import zlib

import numpy as np
from PIL import Image

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
MAGIC = (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\1\0\0WEBPVP8 ")


# ------------------------------------------------------------------ images


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bmp_rle(width=64, height=48):
    """An 8-bit run-length encoded BMP, which Pillow reads but does not write."""
    runs = (bytes((min(200, width - x), x % 251)) for x in range(0, width, 200))
    pixels = (b"".join(runs) + b"\0\0") * height + b"\0\1"
    palette = bytes(value for grey in range(256) for value in (grey, 255 - grey, 9, 0))
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 0, 0, 256, 256)
    start = 14 + len(header) + len(palette)
    return struct.pack("<2sIII", b"BM", start + len(pixels), 0, start) + header + palette + pixels


def image_files():
    """Small files of every format, in the modes and with the metadata that occur in practice."""
    rng = np.random.default_rng(7)
    grid = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    image = grid.resize((64, 48), Image.Resampling.BICUBIC)
    palette = image.quantize(32)
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a description", 72.0
    said = {"exif": exif.tobytes(), "icc_profile": rng.bytes(700)}
    frames = {"save_all": True, "append_images": [image.rotate(90), image.rotate(45)]}
    return {
        "jpeg": encoded(image, "JPEG", comment=b"a comment", **said),
        "jpeg progressive": encoded(image, "JPEG", progressive=True, restart_marker_rows=1),
        "jpeg grey": encoded(image.convert("L"), "JPEG"),
        "jpeg cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "png": encoded(image, "PNG", **said),
        "png palette": encoded(palette, "PNG", transparency=3),
        "png alpha": encoded(clear, "PNG"),
        "png 16 bit": encoded(Image.fromarray(rng.integers(0, 700, (48, 64), np.uint16)), "PNG"),
        "png 1 bit": encoded(image.convert("1"), "PNG"),
        "png animated": encoded(image, "PNG", **frames),
        "webp": encoded(image, "WEBP", **said),
        "webp lossless": encoded(clear, "WEBP", lossless=True),
        "webp animated": encoded(image, "WEBP", **frames),
        "gif": encoded(palette, "GIF", comment=b"a comment", transparency=3),
        "gif animated": encoded(palette, "GIF", **frames),
        "bmp": encoded(image, "BMP"),
        "bmp palette": encoded(palette, "BMP"),
        "bmp rle": bmp_rle(),
    }


def mangled(rng, files):
    """One of `files`, damaged once or several times, or noise that begins like an image file."""
    if rng.random() < 0.05:
        return rng.choice(MAGIC) + rng.randbytes(rng.randrange(400))
    data = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(DAMAGES)(rng, data, files)
    return bytes(data)


def _at(rng, data):
    """A random offset, often in the header."""
    return rng.randrange(min(len(data), rng.choice((32, 200, 1 << 30))) or 1)


def _flip(rng, data, files):
    for _ in range(rng.randint(1, 8)):
        if data:
            data[_at(rng, data)] = rng.randrange(256)
    return data


def _truncate(rng, data, files):
    return data[: rng.randrange(len(data) + 1)]


def _splice(rng, data, files):
    other = rng.choice(files)
    return data[: _at(rng, data)] + other[_at(rng, other) :]


def _overwrite(rng, data, files):
    field = struct.pack(rng.choice(("<H", ">H", "<I", ">I")), rng.choice(NUMBERS) % 65536)
    if len(field) == 4:
        field = struct.pack(rng.choice(("<I", ">I")), rng.choice(NUMBERS))
    at = _at(rng, data)
    data[at : at + len(field)] = field
    return data


def _repeat(rng, data, files):
    at = _at(rng, data)
    part = data[at : at + rng.choice((1, 4, 20, 200))]
    return data[:at] + part * rng.choice((2, 3, 50, 2000)) + data[at:]


def _cut(rng, data, files):
    at = _at(rng, data)
    return data[:at] + data[at + rng.choice((1, 4, 50)) :]


def _chunk(rng, data, files):
    """Change, duplicate or move a chunk of a PNG and correct its checksum. Other formats are
    unchanged."""
    if not data.startswith(MAGIC[1]):
        return data
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        chunks.append((bytes(data[at + 4 : at + 8]), bytearray(data[at + 8 : at + 8 + length])))
        at += 12 + length
    if chunks:
        kind, content = rng.choice(chunks)
        if rng.random() < 0.7:
            _flip(rng, content, files)
        else:
            chunks.insert(rng.randrange(len(chunks)), (rng.choice((kind, b"tRNS")), content))
    out = bytearray(data[:8])
    for kind, content in chunks:
        out += struct.pack(">I", len(content)) + kind + content
        out += struct.pack(">I", zlib.crc32(kind + content))
    return out


DAMAGES = (_flip, _truncate, _splice, _overwrite, _repeat, _cut, _chunk, _chunk)


# ------------------------------------------------------------------ texts

PIECES = (
    *("a cat", "Ünïcödé", "猫", "🐈", "e\u0301\u0316", "İ", "ß", "ﬃ", "\u202e", "<|endoftext|>"),
    *(
        "&",
        ";",
        "&amp;",
        "amp;",
        "&#38;",
        "&semi;",
        "&#xff06;",
        "＆ａｍｐ；",
        "&lt;",
        "<",
        "&nbsp;",
    ),
    *("&#x110000;", "&#xd800;", "&#0;", "&#128;", "&bogus;", "&notit;", "\u037e", "9", "&#"),
    *(
        "Ã©",
        "â€œ",
        "Ã¯Â¼Â†",
        "\x85",
        "\x0b",
        "\x1b[31m",
        "\x1c",
        "\x7f",
        "\ufeff",
        "\u200b",
        "\ufffd",
    ),
    *(" ", "\n", "\r\n", "\t", "\u3000", "\u2028", "\U0010ffff", "'s", "...", "１２"),
)
POISON = ("\0", "\ud800", "\udc00")


def odd_text(rng):
    """Text made of fragments that are special to ftfy, HTML, Unicode or the tokenizer, often
    repeated."""
    parts = []
    for _ in range(rng.randint(1, 12)):
        part = rng.choice(PIECES) if rng.random() < 0.9 else chr(rng.randrange(0x110000))
        part = rng.choice(POISON) if rng.random() < 0.01 else part
        parts.append(part * rng.choice((1, 1, 1, 1, 1, 1, 2, 9, 60, 999)))
    return "".join(parts)


def odd_bytes(rng):
    """Bytes that a client may send as a text: UTF-8, possibly damaged, or noise."""
    data = bytearray(odd_text(rng).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        data = rng.choice((_flip, _truncate, _cut))(rng, data, [data])
    return bytes(data) if rng.random() < 0.9 else rng.randbytes(rng.randrange(60))


# ------------------------------------------------------------------ requests


def strings(items):
    """KServe's encoding of BYTES: each item is preceded by its length."""
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def tensor(name, datatype, shape, raw):
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {}, "raw": raw}


def requests(rng, files, size):
    """A valid request to one of the models, as a dictionary from which both protocols are built."""
    pictures, texts = rng.sample(files, 2), [b"a cat", "ein Hünd".encode()]
    ids = np.array([[49406, 320, 2368, 49407, 0, 0, 0, 0]], np.int32)
    models = {
        "clip_image": [tensor("image", "BYTES", [2, 1], strings(pictures))],
        "image_preprocess": [tensor("image", "BYTES", [2, 1], strings(pictures))],
        "clip_text": [tensor("text", "BYTES", [2, 1], strings(texts))],
        "text_tokenize": [tensor("text", "BYTES", [2, 1], strings(texts))],
        "image_tower": [tensor("pixels", "UINT8", [1, 3, size, size], bytes(3 * size * size))],
        "text_tower": [tensor("input_ids", "INT32", [1, 8], ids.tobytes())],
        "clip_zero_shot": [
            tensor("IMAGE", "BYTES", [1], strings(pictures[:1])),
            tensor("LABELS", "BYTES", [2], strings(texts)),
            tensor("TEMPLATES", "BYTES", [1], strings([b"a {}"])),
        ],
    }
    model = rng.choice(list(models))
    return {"model": model, "version": "", "parameters": {}, "inputs": models[model], "outputs": []}


OUTPUTS = ("image_embeds", "text_embeds", "pixels", "input_ids", "PROBABILITIES", "LOGITS", "", "x")
SHAPES = (
    *([], [0], [1], [-1], [0, 1], [1, 0], [2], [3, 1], [1, 1, 1], [65, 1], [2**31, 1], [2**31]),
    *([2**32, 2**32], [2**63 - 1], [2**62, 4], [-(2**63)], [1] * 40, [1, 3, 0, 0], [1, -3, 4, 4]),
)
TYPES = ("BOOL", "UINT8", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16", "BYTES", "", "STRING")
VALUES = (
    0,
    1,
    -1,
    2**31,
    2**63 - 1,
    -(2**63),
    2**64 - 1,
    0.5,
    True,
    "",
    "x",
    "x" * 5000,
    "\0",
    "é",
)
JSON_VALUES = (0, 1, -1, 0.5, 2**31, 2**64, 1e308, True, "a cat", "")
NAMES = (
    *("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "truncate", "binary"),
    *("triton_enable_empty_final_response", "classification", "binary_data", "binary_data_output"),
    *("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "x", "", '"', "é"),
)
MODELS = ("nothing", "", "clip_image/", "..", "clip image", "é", "x" * 3000, "%00", "image_tower")
VERSIONS = ("1", "2", "-1", "0", "abc", "18446744073709551616", "x" * 300)


def spoilt(rng, request, files):
    """The request with one to three faults."""
    request = copy.deepcopy(request)
    for _ in range(rng.randint(1, 3)):
        rng.choice(FAULTS)(rng, request, files)
    return request


def _some(rng, request):
    return rng.choice(request["inputs"]) if request["inputs"] else {}


def _shape(rng, request, files):
    _some(rng, request)["shape"] = list(rng.choice(SHAPES))


def _datatype(rng, request, files):
    _some(rng, request)["datatype"] = rng.choice(TYPES)


def _name(rng, request, files):
    _some(rng, request)["name"] = rng.choice(("", "x", "image", "é", "y" * 2000))


def _number(rng, request, files):
    inputs = request["inputs"]
    if inputs and rng.random() < 0.5:
        inputs.remove(rng.choice(inputs))
    elif inputs:
        inputs.append(copy.deepcopy(rng.choice(inputs)))
    else:
        inputs.append(tensor("x", "INT32", [1], bytes(4)))


def _raw(rng, request, files):
    """Bytes whose length contradicts the shape, or a string whose length prefix is wrong."""
    given = _some(rng, request)
    raw = bytearray(given.get("raw", b""))
    kind = rng.randrange(5)
    if kind == 0:
        raw = raw[: rng.randrange(len(raw) + 1)]
    elif kind == 1:
        raw += rng.randbytes(rng.choice((1, 4, 100)))
    elif kind == 2:
        raw[:4] = struct.pack("<I", rng.choice((*NUMBERS, len(raw), len(raw) - 3)) % 2**32)
    elif kind == 3:
        raw = bytearray()
    else:
        raw = bytearray(rng.randbytes(rng.randrange(200)))
    given["raw"] = bytes(raw)


def _content(rng, request, files):
    """Well-formed data that no model can use, sometimes far more than a batch."""
    for given in request["inputs"]:
        if given["datatype"] != "BYTES":
            given["raw"] = rng.randbytes(len(given["raw"]))
            continue
        picture = given["name"].lower() == "image"
        count = rng.choice((1, 1, 1, 2, 64, 65, 300))
        items = [mangled(rng, files) if picture else odd_bytes(rng) for _ in range(min(count, 3))]
        items *= -(-count // len(items))
        given["shape"] = [count] + [1] * (len(given["shape"]) - 1)
        given["raw"] = strings(items[:count])


def _outputs(rng, request, files):
    for _ in range(rng.randint(1, 3)):
        parameters = {rng.choice(NAMES): rng.choice(VALUES) for _ in range(rng.randrange(3))}
        request["outputs"].append({"name": rng.choice(OUTPUTS), "parameters": parameters})


def _parameters(rng, request, files):
    where = rng.choice((request, request, _some(rng, request) or request))
    where["parameters"] |= {rng.choice(NAMES): rng.choice(VALUES) for _ in range(3)}


def _place(rng, request, files):
    if rng.random() < 0.5:
        request["model"] = rng.choice(MODELS)
    else:
        request["version"] = rng.choice(VERSIONS)


FAULTS = (
    *(_shape, _datatype, _name, _number, _raw, _raw, _content, _content, _content, _content),
    *(_outputs, _parameters, _parameters, _place),
)


def as_json(request):
    """An HTTP body: the JSON document, then the binary data."""
    document = {"inputs": [], "parameters": request["parameters"]}
    for given in request["inputs"]:
        parameters = {"binary_data_size": len(given["raw"])} | given["parameters"]
        document["inputs"].append({**given, "parameters": parameters})
        document["inputs"][-1].pop("raw")
    if request["outputs"]:
        document["outputs"] = request["outputs"]
    return document, b"".join(given["raw"] for given in request["inputs"])


def http_body(rng, request):
    """Headers and body of an HTTP request, possibly altered as by a proxy."""
    document, tail = as_json(request)
    form = rng.random()
    if form < 0.15:
        _spoil_document(rng, document)
    elif form < 0.3:
        _use_json_tensors(rng, document)
        tail = b""
    _omit_allocations(document)
    head = json.dumps(document).encode()
    if rng.random() < 0.1:
        head = bytes(rng.choice((_flip, _truncate, _cut))(rng, bytearray(head), [head]))
    headers = {"Inference-Header-Content-Length": str(len(head))}
    body = head + tail
    if rng.random() < 0.15:
        wrong = ("-1", "0", "1", str(len(head) - 1), str(len(body) + 1), str(2**63), "x", "", "1e3")
        headers["Inference-Header-Content-Length"] = rng.choice(wrong)
    elif rng.random() < 0.05:
        del headers["Inference-Header-Content-Length"]
    if rng.random() < 0.05:
        headers["Content-Encoding"] = rng.choice(("gzip", "deflate", "br", "x", "gzip, gzip"))
        body = rng.choice((body, zlib.compress(body), zlib.compress(body)[:-5]))
    if rng.random() < 0.05:
        return headers, iter([body[:100], body[100:200], body[200:]])  # chunked transfer encoding
    if rng.random() < 0.05:
        body = rng.choice((b"", b"{}", b"[]", b"null", b'"x"', body[: len(body) // 2]))
    return headers, body


def _use_json_tensors(rng, document):
    """Move all data into the JSON, with other shapes, types and values than declared."""
    for given in document["inputs"]:
        given["parameters"].pop("binary_data_size", None)
        if rng.random() < 0.5:
            given["shape"] = list(rng.choice(SHAPES))
        if rng.random() < 0.5:
            given["datatype"] = rng.choice(TYPES)
        values = [
            rng.choice((0, 1, -1, 0.5, 2**31, 2**64, 1e308, True, "a cat", "")) for _ in "abc"
        ]
        given["data"] = rng.choice((values[:1], values, [values], [[v] for v in values]))


def _omit_allocations(document):
    """Leave out one kind of request that ends tritonserver 2.51 itself; see `ENDS_TRITON`.

    It allocates memory for the shape of a JSON tensor before it looks at the data.
    """
    inputs = document.get("inputs")
    for given in inputs if isinstance(inputs, list) else ():
        if not isinstance(given, dict) or "data" not in given or given.get("datatype") == "BYTES":
            continue
        shape = given.get("shape")
        dims = [dim for dim in shape if isinstance(dim, int)] if isinstance(shape, list) else []
        if abs(math.prod(dims)) > 1 << 24:
            given["shape"] = [3, 1]


def _spoil_document(rng, document):
    """Replace a value with one of another type, or move data from the binary part into the JSON."""
    deep = json.loads("[" * 300 + "]" * 300)
    hostile = (None, [], {}, [[]], "x", -1, 2**70, 1e308, True, [None], {"a": {"b": []}}, deep)
    if rng.random() < 0.5 and document["inputs"]:
        given = rng.choice(document["inputs"])
        data = (["a cat"], [b"\xff".decode("latin-1")], [[["x"]]], [1, "x"], [-1] * 9, "x", [1e400])
        given["parameters"].pop("binary_data_size", None)
        given["data"] = rng.choice((*data, *hostile))
        return
    place = document
    while rng.random() < 0.7:
        inner = [value for value in _values(place) if isinstance(value, dict | list) and value]
        if not inner:
            break
        place = rng.choice(inner)
    if isinstance(place, dict):
        place[rng.choice(list(place) or ["x"])] = rng.choice(hostile)
    elif place:
        place[rng.randrange(len(place))] = rng.choice(hostile)


def _values(place):
    return list(place.values()) if isinstance(place, dict) else list(place)


def grpc_message(rng, request):
    """The request as protobuf, with its contents in a random one of the possible fields. Unchanged
    without `rng`."""
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(
        model_name=request["model"], model_version=request["version"]
    )
    _fill(message.parameters, request["parameters"])
    for given in request["inputs"]:
        shape = [min(max(dim, -(2**63)), 2**63 - 1) for dim in given["shape"]]
        made = message.inputs.add(name=given["name"], datatype=given["datatype"], shape=shape)
        _fill(made.parameters, given["parameters"])
        where = 0.0 if rng is None else rng.random()
        if where < 0.8:
            message.raw_input_contents.append(given["raw"])
        if where > 0.7:
            field = rng.choice(("bytes_contents", "int_contents", "uint_contents", "fp32_contents"))
            contents = getattr(made.contents, field)
            contents.extend([b"a cat", b"\xff"] if field == "bytes_contents" else [1, 2, 3])
    for wanted in request["outputs"]:
        _fill(message.outputs.add(name=wanted["name"]).parameters, wanted["parameters"])
    if rng is not None and rng.random() < 0.05:
        message.raw_input_contents.append(rng.randbytes(rng.randrange(50)))
    return message


def _fill(parameters, values):
    for name, value in values.items():
        target = parameters[name]
        if isinstance(value, bool):
            target.bool_param = value
        elif isinstance(value, float):
            target.double_param = value
        elif isinstance(value, str):
            target.string_param = value
        elif value > 2**63 - 1:
            target.uint64_param = value
        else:
            target.int64_param = value
