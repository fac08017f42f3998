"""What is taken at most: of a picture, a text, a request. Stated here, and nowhere else.

Every limit is looked at before the work that it bounds is begun, in process and in the server
alike. What is over it is refused with an `ImageError` or `TextError`, over the network INVALID_ARG,
that names the limit and what arrived. `max_batch_size` is the one limit that Triton itself keeps.
"""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded, by Pillow's names; left alone, Pillow sniffs about 40 formats. Of an animation,
the first frame."""

MAX_PICTURE_BYTES = 32 << 20
"""Of an encoded picture; a file's size is looked at before it is read."""

MAX_PIXELS = 64 << 20
"""Of a picture, width x height by its header; Pillow itself only warns below 179 million. The worst
of so many that we could make, a JPEG of `MAX_SCANS`, takes 4 s to decode on one core of a 2-core
server, others 1 to 3 s; a WebP takes 1 GB of memory meanwhile, others 0.3 to 0.5 GB."""

MAX_WHOLE_PIXELS = 4 << 20
"""Of a picture that is resized whole, before the crop: about 16 MB. Of one that would get larger,
such as 1 x 60,000, only what survives the crop is resized."""

MAX_PARTS = 20_000
"""Chunks of a PNG, segments of a JPEG, blocks before the first frame of a GIF. 32 MiB in chunks of
8 KiB, libpng's default, are 4,096. The worst takes 65 ms: 20,000 empty ones, each a call of
Pillow's."""

MAX_SCANS = 50
"""Of a JPEG, each of which visits every pixel; libjpeg writes 10 for a progressive one, optimizers
some more."""

MAX_JPEG_HEADER_BYTES = 128 << 10
"""Of a JPEG's tables before its first scan, without metadata; common ones take 1 KiB."""

MAX_RLE_PIXELS = 1 << 20
"""Of a run-length encoded BMP, which Pillow decodes in Python: 0.6 s in the worst case."""

MAX_TEXT_BYTES = 8 << 10
"""Of a text, in UTF-8; what fits into 77 tokens is about a tenth of that. With the limits below the
worst text that we could make, of dotted capital I, takes 30 to 45 ms of CPU; without, 32 KB of
nested HTML entities take 5 s, 320 KB a hundred times that, and `&#` with 4,301 digits is a
ValueError."""

MAX_WORD = 1_000
"""Characters between two whitespaces, before and after the text is repaired: what normalizing
sorts, and what one HTML entity can hold, is as long at most."""

MAX_LINES = 100
"""Of a text; ftfy repairs each by itself."""

MAX_UNESCAPES = 8
"""How many times HTML may have been escaped: `&amp;amp;` is 2. Each time costs a pass of ftfy."""

MAX_LABELS = 50_000
"""Of a label set."""

MAX_TEMPLATES = 1_000
"""Of a label set."""

MAX_LABEL_TEXTS = 200_000
"""Labels x templates of a label set."""

MAX_LABEL_SET_BYTES = 32 << 20
"""All texts of a label set together, in UTF-8."""

MAX_CLASSIFIED = 256
"""Pictures of a request to `clip_zero_shot`, which has no batch dimension: with the most labels,
its answer takes 100 MB."""
