"""Client of the Triton server that turns images and texts into embeddings and probabilities.

    with ClipClient("grpc://localhost:8001") as client:
        client.embed_images(["cat.jpg", "dog.jpg"])          # float32 [2, dim]
        client.classify(["cat.jpg"], ["cat", "dog"])         # float32 [1, 2]

This module does not know how the server is started (`serving.triton`) or which runners it uses.
"""

import functools
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from PIL import Image

from serving.bundles.identity import ModelIdentity
from serving.clients.endpoint import NO_CREDENTIALS, Credentials
from serving.clients.transport import Calls
from serving.errors import ImageError, InputError, ServerError, TextError
from serving.inputs.decode import read_image, too_large
from serving.inputs.labels import LabelSet
from serving.inputs.preprocess import ImageInput
from serving.inputs.tokenizer import each
from serving.limits import MAX_IMAGE_BYTES, MAX_TEXT_BYTES
from serving.tasks.embedder import Floats

T = TypeVar("T")


class ClipClient:
    """Client of the models `clip_image`, `clip_text` and `clip_zero_shot`; a context manager.

    Inputs are split into requests of `batch_size`. Up to `in_flight` requests run at a time, so
    that the server decodes some while it embeds others. Safe to share between threads.

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
    ) -> None:
        self._calls = Calls(url, timeout=timeout, attempts=attempts, credentials=credentials)
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="clip-client")
        try:
            config = self._calls.config("clip_image")
            facts = {key: v["string_value"] for key, v in config.get("parameters", {}).items()}
            self.logit_scale = float(facts["logit_scale"])
            self.templates: tuple[str, ...] = tuple(json.loads(facts["templates"]))
            self.facts: dict[str, str] = facts
            self.identity = ModelIdentity(
                name=facts["model"],
                weights_sha256=facts["weights_sha256"],
                embed_dim=int(facts["embed_dim"]),
            )
        except KeyError as error:
            self.close()
            raise ServerError(
                f"the model clip_image at {url} has no parameter {error}: its repository was "
                "assembled by another version of this project",
                advice="assemble the repository again with `clip-deploy assemble`",
            ) from error
        except BaseException:
            self.close()
            raise
        self._batch_size = min(batch_size, int(config["max_batch_size"]))

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
        self._pool.shutdown(cancel_futures=True)
        self._calls.close()

    def embed_images(self, images: Sequence[ImageInput]) -> Floats:
        """Embed images.

        Args:
            images: paths, encoded bytes, PIL images, or uint8 RGB arrays [height, width, 3].

        Returns:
            float32 [n, dim], unit length.

        Raises:
            ImageError: an image cannot be used; the error says which and why.
            OverloadedError: the server's queues were full at every attempt.
            ServerError: the server failed, or did not answer in time.
        """
        infer = functools.partial(self._infer_bytes, "clip_image", "image", "image_embeds")
        return self._embed("images", images, encode_image, infer, ImageError)

    def embed_texts(self, texts: Sequence[str], *, truncate: bool = False) -> Floats:
        """Embed texts.

        Args:
            texts: at least one.
            truncate: cut texts that are too long instead of raising an error.

        Returns:
            float32 [n, dim], unit length.

        Raises:
            TextError: a text cannot be used; the error says which and why.
            OverloadedError: the server's queues were full at every attempt.
            ServerError: the server failed, or did not answer in time.
        """
        whole = functools.partial(self._infer_bytes, "clip_text", "text", "text_embeds")
        infer = self._infer_truncated if truncate else whole
        return self._embed("texts", texts, _encode_text, infer, TextError)

    def classify(
        self,
        images: Sequence[ImageInput],
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
    ) -> Floats:
        """Return the probability of each label for each image, from the model `clip_zero_shot`.

        The server embeds a label set once and caches it. The first call with many labels and
        templates therefore takes longer (the client's `timeout` includes this); later calls only
        embed their images.

        Args:
            images: as for `embed_images`.
            labels: distinct labels.
            templates: prompt templates; default: those of the checkpoint.

        Returns:
            float32 [n, labels]; rows sum to 1.

        Raises:
            ImageError: an image cannot be used; the error says which and why.
            TextError: labels or templates cannot be used; the error says which and why.
            OverloadedError: the server's queues were full at every attempt.
            ServerError: the server has no `clip_zero_shot`, failed, or did not answer in time.
        """
        LabelSet.of(labels, self.templates if templates is None else templates)
        given = [self._strings("LABELS", each("labels", labels, _encode_text))]
        if templates is not None:
            given.append(self._strings("TEMPLATES", each("templates", templates, _encode_text)))

        def infer(data: list[bytes]) -> Floats:
            tensors = [self._strings("IMAGE", data), *given]
            scores: Floats = self._calls.infer("clip_zero_shot", tensors, "PROBABILITIES", {})
            return scores

        return self._embed("images", images, encode_image, infer, ImageError)

    def _embed(
        self,
        kind: str,
        items: Sequence[T],
        encode: Callable[[T], bytes],
        infer: Callable[[list[bytes]], Floats],
        error_type: type[InputError],
    ) -> Floats:
        if isinstance(items, str | bytes):
            raise error_type(f"expected a sequence of {kind}, got one {type(items).__name__}")

        def embed(start: int) -> Floats:
            data = []
            for index, item in enumerate(items[start : start + self._batch_size], start):
                try:
                    data.append(encode(item))
                except error_type as error:
                    raise error.at(kind, index, _path(kind, item)) from error
            try:
                return infer(data)
            except InputError as error:
                if error.kind == kind or (error.kind is None and len(data) == 1):
                    item = items[start + (error.index or 0)]
                    raise error.at(kind, start, _path(kind, item)) from error
                raise  # an error of labels or templates, which are the same in every request

        if not items:
            raise error_type(f"no {kind} to embed", advice="give at least one")
        futures = [self._pool.submit(embed, s) for s in range(0, len(items), self._batch_size)]
        try:
            return np.concatenate([future.result() for future in futures])
        finally:
            for future in futures:
                future.cancel()

    def _infer_truncated(self, data: list[bytes]) -> Floats:
        """Tokenize and embed with two requests.

        The response cache of the ensemble ignores request parameters: it would answer requests
        without `truncate` with embeddings of truncated texts.
        """
        ids = self._infer_bytes("text_tokenize", "text", "input_ids", data, {"truncate": True})
        tensor = self._calls.protocol.InferInput("input_ids", ids.shape, "INT32")
        tensor.set_data_from_numpy(ids)
        embeddings: Floats = self._calls.infer("text_tower", [tensor], "text_embeds", {})
        return embeddings

    def _infer_bytes(
        self,
        model: str,
        source: str,
        target: str,
        data: list[bytes],
        parameters: dict[str, Any] | None = None,
    ) -> Any:
        return self._calls.infer(model, [self._strings(source, data, 1)], target, parameters or {})

    def _strings(self, name: str, data: list[bytes], *rest: int) -> Any:
        """Return an input tensor of shape [len(data), *rest]."""
        tensor = self._calls.protocol.InferInput(name, [len(data), *rest], "BYTES")
        tensor.set_data_from_numpy(np.array(data, dtype=np.object_).reshape(len(data), *rest))
        return tensor


def encode_image(picture: ImageInput) -> bytes:
    """Return the encoded image to send: files and bytes unchanged, pixels as lossless PNG.

    Raises:
        ImageError: the file does not exist, the array is not uint8 [height, width, 3], or the
            encoded image exceeds the limit.
    """
    data = _encoded(picture)
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(too_large(len(data)))
    return data


def _encoded(image: ImageInput) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(
                f"expected an array uint8 [height, width, 3], got {image.dtype} {list(image.shape)}"
            )
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _path(kind: str, item: object) -> str | None:
    """Return the name that errors give an item: an image's path."""
    return str(item) if kind == "images" and isinstance(item, str | os.PathLike) else None


def _encode_text(text: str) -> bytes:
    if not isinstance(text, str):
        raise TextError(f"expected a str, got {type(text).__name__}")
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"the text has a lone surrogate at position {error.start}", advice="remove it"
        ) from error
    if len(data) > MAX_TEXT_BYTES:
        raise TextError(
            f"the text has {len(data)} bytes, more than the {MAX_TEXT_BYTES} allowed",
            advice="shorten it",
        )
    return data
