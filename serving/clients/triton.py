"""Client of the Triton server that turns images and texts into embeddings and probabilities.

    with ClipClient("grpc://localhost:8001") as client:
        client.embed_images(["cat.jpg", "dog.jpg"])          # float32 [2, dim]
        client.classify("cat.jpg", ["cat", "dog"])           # float32 [1, 2]

This module does not know how the server is started (`serving.triton`) or which runners it uses.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from serving.bundles.identity import ModelIdentity
from serving.bundles.manifest import ImageSpec
from serving.clients.endpoint import NO_CREDENTIALS, Credentials
from serving.clients.transport import Calls
from serving.errors import InputError, ServerError
from serving.inputs.images import Fetch, ImageInput, Images, each_image, opened
from serving.inputs.labels import LabelSet
from serving.inputs.preprocess import encode_pixels, pixels_of
from serving.inputs.texts import Texts, checked_text, each_text
from serving.inputs.tokenizer import each
from serving.tasks.embedder import Floats
from serving.util.finite import check_count
from serving.util.typed_json import from_json, parse_json

T = TypeVar("T")

_REQUEST_BYTES = 8 << 20
"""Maximum size of the inputs of a request, in bytes, unless a single one is larger. Photos of a
batch thus do not exceed the limit of a gateway, and the server decodes several requests at a time.
"""


class ClipClient:
    """Client of the models `clip_image`, `clip_text` and `clip_zero_shot`; a context manager.

    Inputs are split into requests of `batch_size`, or fewer if they are large. Up to `in_flight`
    requests run at a time, so that the server decodes some while it embeds others. Inputs are taken
    from an iterator only when their request can begin.

    Safe to share between threads. Processes forked from this one can use a client over HTTP; over
    gRPC they get a `ServerError`, because the gRPC library does not work there.

    Args:
        url: `grpc://host:port` or `http://host:port`; with TLS `grpcs://` or `https://`.
        timeout: seconds that a request may take, including all its attempts. After that the server
            drops it from its queues; over HTTP this applies only to images.
        batch_size: images or texts per request; limited to the server's maximum.
        in_flight: maximum number of concurrent requests.
        attempts: maximum number of attempts of a request, and of the first connection. A request
            is retried after a pause if the server was unavailable or full (`UnavailableError`), but
            not if it was invalid or exceeded its deadline. 1 disables retries.
        credentials: files for TLS.
        fetch: function that downloads images given as http:// or https:// URLs; called by several
            threads. By default, URLs are an error.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        batch_size: int = 16,
        in_flight: int = 8,
        attempts: int = 4,
        credentials: Credentials = NO_CREDENTIALS,
        fetch: Fetch | None = None,
    ) -> None:
        check_count("batch_size", batch_size)
        check_count("in_flight", in_flight)
        self._calls = Calls(
            url, timeout=timeout, attempts=attempts, threads=in_flight, credentials=credentials
        )
        self._in_flight, self._fetch = in_flight, fetch
        try:
            config = self._calls.config("clip_image")
            facts = {key: v["string_value"] for key, v in config.get("parameters", {}).items()}
            self.logit_scale = float(facts["logit_scale"])
            self.templates: tuple[str, ...] = tuple(parse_json(facts["templates"]))
            self.facts: dict[str, str] = facts
            self._spec = from_json(ImageSpec, parse_json(facts["image"]))
            self.identity = ModelIdentity(
                name=facts["model"],
                weights_sha256=facts["weights_sha256"],
                embed_dim=int(facts["embed_dim"]),
            )
        except (KeyError, ValueError) as error:
            self.close()
            missing = f"has no parameter {error}" if isinstance(error, KeyError) else str(error)
            raise ServerError(
                f"the model clip_image at {url} {missing}: its repository was assembled by another "
                "version of this project",
                advice="assemble the repository again with `clip-deploy assemble`",
            ) from error
        except BaseException:
            self.close()
            raise
        self._batch_size = min(batch_size, int(config.get("max_batch_size", 0)) or 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel waiting requests and close all connections."""
        self._calls.close()

    def embed_images(self, images: Images) -> Floats:
        """Embed images.

        Encoded images are sent unchanged. PIL images and arrays are preprocessed here, as the
        server would, and sent as lossless PNGs.

        Args:
            images: any number of images, or one; see `serving.inputs.images.ImageInput`.

        Returns:
            float32 [n, dim], unit length.

        Raises:
            ImageError: an image cannot be used; the error says which and why.
            OverloadedError: the server's queues were full at every attempt.
            ServerError: the server failed, or did not answer in time.
        """

        def infer(data: list[bytes]) -> Floats:
            tensors = [self._strings("image", data, 1)]
            return self._calls.infer("clip_image", tensors, "image_embeds", (len(data), self._dim))

        return self._each_batch("images", each_image(images), self._encoded, infer, self._dim)

    def embed_texts(self, texts: Texts, *, truncate: bool = False) -> Floats:
        """Embed texts.

        Args:
            texts: any number of texts, or one.
            truncate: cut texts that are too long instead of raising an error; see
                `serving.inputs.tokenizer.Tokenizer`.

        Returns:
            float32 [n, dim], unit length.

        Raises:
            TextError: a text cannot be used; the error says which and why.
            OverloadedError: the server's queues were full at every attempt.
            ServerError: the server failed, or did not answer in time.
        """
        model = "clip_text_truncate" if truncate else "clip_text"

        def infer(data: list[bytes]) -> Floats:
            tensors = [self._strings("text", data, 1)]
            return self._calls.infer(model, tensors, "text_embeds", (len(data), self._dim))

        encode = partial(_encoded_text, truncate=truncate)
        return self._each_batch("texts", each_text(texts), encode, infer, self._dim)

    def classify(
        self,
        images: Images,
        labels: Iterable[str],
        templates: Iterable[str] | None = None,
    ) -> Floats:
        """Return the probability of each label for each image, from the model `clip_zero_shot`.

        The server embeds a label set once and caches it. The first call with many labels and
        templates therefore takes longer (the client's `timeout` includes this); later calls only
        embed their images.

        Args:
            images: as for `embed_images`.
            labels: distinct labels. A single str is an error, because it is more often a mistake
                than a label set of one.
            templates: prompt templates; default: those of the checkpoint.

        Returns:
            float32 [n, labels]; rows sum to 1.

        Raises:
            ImageError: an image cannot be used; the error says which and why.
            TextError: labels or templates cannot be used; the error says which and why.
            OverloadedError: the server's queues were full at every attempt.
            ServerError: the server has no `clip_zero_shot`, failed, or did not answer in time.
        """
        wanted = LabelSet.of(labels, self.templates if templates is None else templates)
        given = [self._strings("LABELS", each("labels", wanted.labels, _utf8))]
        if templates is not None:
            encoded = each("templates", wanted.templates, _utf8)
            given.append(self._strings("TEMPLATES", encoded))
        count = len(wanted.labels)

        def infer(data: list[bytes]) -> Floats:
            tensors = [self._strings("IMAGE", data), *given]
            return self._calls.infer("clip_zero_shot", tensors, "PROBABILITIES", (len(data), count))

        return self._each_batch("images", each_image(images), self._encoded, infer, count)

    @property
    def _dim(self) -> int:
        return self.identity.embed_dim

    def _encoded(self, image: ImageInput) -> tuple[bytes, str | None]:
        """Return the encoded image to send, and its name."""
        source = opened(image, self._fetch)
        if isinstance(source.content, bytes):
            return source.content, source.name
        return encode_pixels(pixels_of(source, self._spec), self._spec), source.name

    def _each_batch(
        self,
        kind: str,
        items: Iterator[T],
        encode: Callable[[T], tuple[bytes, str | None]],
        infer: Callable[[list[bytes]], Floats],
        width: int,
    ) -> Floats:
        """Return the answers to all items, float32 [n, width].

        If several items cannot be used, the error is that of the first one.
        """

        def ask(start: int, batch: list[T]) -> Floats:
            data: list[bytes] = []
            names: list[str | None] = []
            try:
                for item in batch:
                    encoded, name = encode(item)
                    data.append(encoded)
                    names.append(name)
            except InputError as error:
                if data:
                    with suppress(ServerError):  # an earlier item may be unusable for the server
                        ask(start, batch[: len(data)])
                raise error.at(kind, start + len(data)) from error
            answers = []
            for part in _portions(data):
                first, count = part.start, part.stop - part.start
                try:
                    answers.append(infer(data[part]))
                except InputError as error:
                    if error.kind == kind or (error.kind is None and count == 1):
                        name = names[first + (error.index or 0)]
                        raise error.at(kind, start + first, name) from error
                    raise  # an error of labels or templates, which are the same in every request
            return np.concatenate(answers)

        futures: list[Future[Floats]] = []
        waiting: set[Future[Floats]] = set()
        try:
            while batch := list(islice(items, self._batch_size)):
                futures.append(self._calls.submit(ask, len(futures) * self._batch_size, batch))
                waiting.add(futures[-1])
                if len(waiting) >= self._in_flight:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    if any(future.exception() for future in done):
                        break
            parts = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        return np.concatenate(parts) if parts else np.empty((0, width), np.float32)

    def _strings(self, name: str, data: list[bytes], *rest: int) -> Any:
        """Return an input tensor of shape [len(data), *rest]."""
        tensor = self._calls.protocol.InferInput(name, [len(data), *rest], "BYTES")
        tensor.set_data_from_numpy(np.array(data, dtype=np.object_).reshape(len(data), *rest))
        return tensor


def _portions(data: list[bytes]) -> Iterator[slice]:
    """Divide encoded inputs, at least one, into requests of up to `_REQUEST_BYTES`."""
    start = size = 0
    for index, item in enumerate(data):
        if index > start and size + len(item) > _REQUEST_BYTES:
            yield slice(start, index)
            start, size = index, 0
        size += len(item)
    yield slice(start, len(data))


def _encoded_text(text: str, *, truncate: bool) -> tuple[bytes, None]:
    return checked_text(text, truncate=truncate).encode("utf-8"), None


def _utf8(text: str) -> bytes:
    return checked_text(text).encode("utf-8")
