"""A client of the Triton server: pictures and texts in, embeddings and probabilities out.

    with ClipClient("grpc://localhost:8001") as client:
        client.embed_images(["cat.jpg", "dog.jpg"])          # float32 [2, dim]
        client.classify(["cat.jpg"], ["cat", "dog"])         # float32 [1, 2]

Does not know: how the server is run (`triton.py`), or what it runs.
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
from serving.inputs.decode import read_picture, too_large
from serving.inputs.labels import LabelSet
from serving.inputs.preprocess import Picture
from serving.inputs.tokenizer import each
from serving.limits import MAX_PICTURE_BYTES, MAX_TEXT_BYTES
from serving.tasks.embedder import Floats

T = TypeVar("T")


class ClipClient:
    """Calls `clip_image`, `clip_text` and `clip_zero_shot`; use it in a `with` statement.

    Inputs are cut into requests of `batch_size`, of which up to `in_flight` are under way at a
    time, so that the server decodes some while it runs others. Safe to share between threads.

    Args:
        url: `grpc://host:port` or `http://host:port`; with TLS `grpcs://` or `https://`.
        timeout: seconds a request may take, all its attempts included; after that the server drops
            it from its queues, over HTTP pictures only.
        batch_size: pictures or texts a request, at most the server's own limit.
        in_flight: requests under way at a time.
        attempts: how often a request, or looking for the server in the beginning, is tried at most.
            Tried again, after a moment, is what found nobody or a full server (`UnavailableError`);
            never what was wrong, or took too long. 1 tries once.
        credentials: for TLS: whom to trust, and what to show.
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
                f"{url} serves a clip_image without {error}; it was not assembled by this version "
                "of the project, assemble its repository again"
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
        """End all connections."""
        self._pool.shutdown(cancel_futures=True)
        self._calls.close()

    def embed_images(self, images: Sequence[Picture]) -> Floats:
        """Embed pictures.

        Args:
            images: paths, encoded bytes, PIL images, or uint8 RGB arrays [height, width, 3].

        Returns:
            float32 [n, dim], unit length.

        Raises:
            ImageError: a picture cannot be used; the message says which and why.
            OverloadedError: the server was full, at every attempt.
            ServerError: it did not answer in time, or failed.
        """
        infer = functools.partial(self._infer_bytes, "clip_image", "image", "image_embeds")
        return self._embed("images", images, encode_picture, infer, ImageError)

    def embed_texts(self, texts: Sequence[str], *, truncate: bool = False) -> Floats:
        """Embed texts; `truncate` cuts those that are too long instead of refusing them.

        Returns:
            float32 [n, dim], unit length.

        Raises:
            TextError: a text cannot be used; the message says which and why.
            OverloadedError: the server was full, at every attempt.
            ServerError: it did not answer in time, or failed.
        """
        whole = functools.partial(self._infer_bytes, "clip_text", "text", "text_embeds")
        infer = self._infer_truncated if truncate else whole
        return self._embed("texts", texts, _encode_text, infer, TextError)

    def classify(
        self,
        images: Sequence[Picture],
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
    ) -> Floats:
        """Probability of each label for each picture, by the server's `clip_zero_shot`.

        The server embeds a set of labels once and keeps it: the first call with many labels and
        templates takes time (the client's `timeout` covers it), later ones what their pictures do.

        Args:
            images: as for `embed_images`.
            labels: that differ.
            templates: what labels are put into; default: the checkpoint's own.

        Returns:
            float32 [n, labels]; rows sum to 1.

        Raises:
            ImageError: a picture cannot be used; the message says which and why.
            TextError: labels or templates cannot be used; the message says which and why.
            OverloadedError: the server was full, at every attempt.
            ServerError: it has no `clip_zero_shot`, did not answer in time, or failed.
        """
        LabelSet.of(labels, self.templates if templates is None else templates)
        given = [self._strings("LABELS", each("labels", labels, _encode_text))]
        if templates is not None:
            given.append(self._strings("TEMPLATES", each("templates", templates, _encode_text)))

        def infer(data: list[bytes]) -> Floats:
            tensors = [self._strings("IMAGE", data), *given]
            scores: Floats = self._calls.infer("clip_zero_shot", tensors, "PROBABILITIES", {})
            return scores

        return self._embed("images", images, encode_picture, infer, ImageError)

    def _embed(
        self,
        kind: str,
        items: Sequence[T],
        encode: Callable[[T], bytes],
        infer: Callable[[list[bytes]], Floats],
        refusal: type[InputError],
    ) -> Floats:
        if isinstance(items, str | bytes):
            raise refusal(f"expected a sequence of {kind}, got one {type(items).__name__}")

        def embed(start: int) -> Floats:
            data = []
            for index, item in enumerate(items[start : start + self._batch_size], start):
                try:
                    data.append(encode(item))
                except refusal as error:
                    raise error.at(kind, index, _path(kind, item)) from error
            try:
                return infer(data)
            except InputError as error:
                if error.kind == kind or (error.kind is None and len(data) == 1):
                    item = items[start + (error.index or 0)]
                    raise error.at(kind, start, _path(kind, item)) from error
                raise  # about labels or templates, which are the same in every request

        if not items:
            raise refusal(f"no {kind} to embed; give at least one")
        futures = [self._pool.submit(embed, s) for s in range(0, len(items), self._batch_size)]
        try:
            return np.concatenate([future.result() for future in futures])
        finally:
            for future in futures:
                future.cancel()

    def _infer_truncated(self, data: list[bytes]) -> Floats:
        """Tokenize and embed in two steps.

        The ensemble's cache does not know of request parameters: it would give what was embedded
        truncated to those who did not ask for that.
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
        """An input of shape [len(data), *rest]."""
        tensor = self._calls.protocol.InferInput(name, [len(data), *rest], "BYTES")
        tensor.set_data_from_numpy(np.array(data, dtype=np.object_).reshape(len(data), *rest))
        return tensor


def encode_picture(picture: Picture) -> bytes:
    """The encoded picture that is sent: files and bytes as they are, pixels as PNG (lossless).

    Raises:
        ImageError: there is no such file, the array is not uint8 [height, width, 3], or what would
            be sent is over the limit.
    """
    data = _encoded_picture(picture)
    if len(data) > MAX_PICTURE_BYTES:
        raise ImageError(too_large(len(data)))
    return data


def _encoded_picture(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | os.PathLike):
        return read_picture(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ImageError(
                f"expected an array uint8 [height, width, 3], got {picture.dtype} "
                f"{list(picture.shape)}"
            )
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
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
