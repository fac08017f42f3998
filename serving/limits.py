"""Limits on images, texts and requests. Every limit is defined here and nowhere else.

Each limit is checked before the work that it bounds begins, in process and in the server alike. An
input over a limit raises an `ImageError` or a `TextError` (INVALID_ARG over the network) that names
the limit and the actual value. The only limit that Triton itself enforces is `max_batch_size`.
"""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Image formats that are decoded, by Pillow's names; by default Pillow tries about 40. Only the
first frame of an animation is used."""

MAX_IMAGE_BYTES = 32 << 20
"""Maximum size of an encoded image, in bytes. Checked before the file is read."""

MAX_PIXELS = 64 << 20
"""Maximum width x height of an image according to its header. Pillow itself only warns up to 179
million pixels. The slowest image of this size that the tests construct, a JPEG with `MAX_SCANS`
scans, takes 4 s to decode on one core of a 2-core server; the other formats take 1 to 3 s. Decoding
needs 1 GB of memory for a WebP, 0.3 to 0.5 GB for the others."""

LARGE_PIXELS = 16 << 20
"""Number of pixels above which a server leaves an image to the few processes of
`image_preprocess_large`. An image of this size takes up to 0.25 GB of memory to decode; cameras
make images of 12 to 24 million pixels."""

LARGE_REQUEST_PIXELS = 64 << 20
"""Number of pixels above which a server leaves all images of a request to
`image_preprocess_large`."""

MAX_WHOLE_PIXELS = 4 << 20
"""Maximum size, in pixels, of the result when an image is resized as a whole before the crop: about
16 MB. If the result would be larger, as for an image of 1 x 60,000 pixels, only the area that
survives the crop is resized."""

MAX_PARTS = 20_000
"""Maximum number of chunks of a PNG, segments of a JPEG, or blocks before the first frame of a GIF.
A PNG of 32 MiB in chunks of 8 KiB, libpng's default, has 4,096 chunks. The worst case takes 65 ms:
20,000 empty chunks, each handled by a separate call within Pillow."""

MAX_SCANS = 50
"""Maximum number of scans of a JPEG; each scan visits every pixel. libjpeg writes 10 scans for a
progressive JPEG, optimizers write a few more."""

MAX_JPEG_HEADER_BYTES = 128 << 10
"""Maximum size, in bytes, of a JPEG's tables before its first scan, without metadata. 1 KiB is
common."""

MAX_RLE_PIXELS = 1 << 20
"""Maximum number of pixels of a run-length encoded BMP, which Pillow decodes in Python: 0.6 s in
the worst case."""

MAX_TEXT_BYTES = 8 << 10
"""Maximum size of a text in UTF-8, in bytes; 77 tokens take about a tenth of that. Within this and
the following limits, the slowest text that the tests construct, made of dotted capital I, takes 30
to 45 ms of CPU time. Without them, 32 KB of nested HTML entities take 5 s, 320 KB a hundred times
as long, and `&#` with 4,301 digits raises a ValueError."""

MAX_WORD = 1_000
"""Maximum number of characters between two whitespace characters, before and after the text is
repaired. It bounds the sequences that Unicode normalization sorts, and the length of an HTML
entity."""

MAX_LINES = 100
"""Maximum number of lines of a text; ftfy repairs each line separately."""

MAX_UNESCAPES = 8
"""Maximum number of times that HTML in a text may have been escaped: `&amp;amp;` is 2. Each time
costs one pass of ftfy."""

MAX_LABELS = 50_000
"""Maximum number of labels of a label set."""

MAX_TEMPLATES = 1_000
"""Maximum number of prompt templates of a label set."""

MAX_LABEL_TEXTS = 200_000
"""Maximum number of texts of a label set: labels x templates."""

MAX_LABEL_SET_BYTES = 32 << 20
"""Maximum size of all texts of a label set together, in bytes of UTF-8."""

MAX_CLASSIFIED = 256
"""Maximum number of images of a request to `clip_zero_shot`, which has no batch dimension. With
`MAX_LABELS` labels the response takes 100 MB."""
