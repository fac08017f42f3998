"""Pictures and labels -> probabilities, by the other models of this server.

`execute` hands each request to a thread and returns at once; the answer is sent when it is there.
So a request that waits for a large label set holds up nobody else's, in one process that all label
sets are kept in. (Response senders outside decoupled models: Triton 24.07 and later.)
"""

import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from serving.answers import may_be_told, refused, response
from serving.bundle import Bundle
from serving.errors import ImageError, TextError, relocated
from serving.label_sets import Abandoned, LabelSetCache, embedding_work, key_of
from serving.tokenizer import Tokenizer
from serving.zero_shot import LabelSet, softmax

Floats = NDArray[np.float32]

_UNDER_WAY = 32  # requests whose pictures are being embedded; more wait in Triton's queue


class TritonPythonModel:
    """`IMAGE` [n], `LABELS` [labels], `TEMPLATES` -> `PROBABILITIES`, `LOGITS` [n, labels]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the bundle says of the model, and the configuration of the limits."""
        parameters = json.loads(args["model_config"])["parameters"]
        limits = {key: value["string_value"] for key, value in parameters.items()}
        bundle = Bundle.open(Path(args["model_repository"], args["model_version"], "bundle"))
        self.manifest = bundle.manifest
        self.tokenizer = Tokenizer(bundle.tokenizer, bundle.manifest.text)
        self.chunk, self.max_texts = int(limits["chunk"]), int(limits["max_texts"])
        self.cache = LabelSetCache(int(limits["cache_bytes"]))
        self.free = threading.Semaphore(_UNDER_WAY)
        self.threads = ThreadPoolExecutor(_UNDER_WAY, thread_name_prefix="clip-zero-shot")

    def execute(self, requests: list[Any]) -> None:
        """Begin with each request."""
        for request in requests:
            self.free.acquire()
            self.threads.submit(self.begin, Call(request, self.manifest.logit_scale))

    def begin(self, call: "Call") -> None:
        """Embed a request's pictures, and answer it, or have it wait for its labels."""
        try:
            labels = self.label_set(call.request)
            call.images = self.embed_images(call.request)
        except Exception as error:  # whatever it is, the client is to hear of it
            call.failed(error)
            return
        finally:
            self.free.release()
        key = key_of(self.manifest.provenance.weights_sha256, labels)
        kept = self.cache.ask(key, lambda: self.work(labels), call)
        if kept is not None:
            call.ready(kept)

    def label_set(self, request: Any) -> LabelSet:
        """The labels and templates of a request."""
        templates = texts(request, "TEMPLATES")
        labels = LabelSet(
            texts(request, "LABELS") or (),
            self.manifest.templates if templates is None else templates,
        )
        if len(labels) > self.max_texts:
            raise TextError(
                f"{len(labels.labels)} labels x {len(labels.templates)} templates are "
                f"{len(labels)} texts; this server takes up to {self.max_texts} in a request"
            )
        return labels

    def embed_images(self, request: Any) -> Floats:
        """Embeddings of a request's pictures, by `clip_image`."""
        pictures = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().ravel()
        if not len(pictures):
            raise ImageError("no images to classify; give at least one")
        parts = []
        for start in range(0, len(pictures), self.chunk):
            batch = pictures[start : start + self.chunk].reshape(-1, 1)
            try:
                parts.append(infer("clip_image", "image", batch, "image_embeds"))
            except Refusal as error:
                # Its code does not tell (2.51: always internal), but a picture's error names it.
                if not str(error).startswith("images["):
                    raise
                names = [""] * len(pictures)
                raise ImageError(relocated(str(error), "images", start, names)) from error
        return np.concatenate(parts)

    def work(self, labels: LabelSet) -> Any:
        """What embeds a label set, by `text_tower`; `clip_text` would cache every single text."""
        return embedding_work(
            labels,
            self.tokenizer,
            lambda ids: infer("text_tower", "input_ids", ids, "text_embeds"),
            self.chunk,
        )

    def finalize(self) -> None:
        """Drop what nobody will wait for any more."""
        self.threads.shutdown()
        self.cache.close()


class Call:
    """One request until it is answered; a `serving.label_sets.Waiter`."""

    images: Floats

    def __init__(self, request: Any, logit_scale: float) -> None:
        self.request, self.sender = request, request.get_response_sender()
        self.seconds = request.timeout() * 1e-6 or math.inf
        self.deadline = time.monotonic() + self.seconds
        self.logit_scale = np.float32(logit_scale)

    def wanted(self) -> bool:
        """Whether its time is not over, and its client still there, as far as Triton knows."""
        # Over gRPC Triton tells of clients that went away, over HTTP (2.51) it does not.
        return time.monotonic() < self.deadline and not self.sender.is_cancelled()

    def ready(self, labels: Floats) -> None:
        """Answer with the pictures and their labels, float32 [labels, dim]."""
        try:
            logits = self.logit_scale * (self.images @ labels.T)
            tensors = [
                pb_utils.Tensor("PROBABILITIES", softmax(logits)),
                pb_utils.Tensor("LOGITS", logits),
            ]
        except Exception as error:  # such as no memory; whoever calls us has others to serve
            self.failed(error)
            return
        self.send(pb_utils.InferenceResponse(tensors))

    def failed(self, error: Exception) -> None:
        """Answer with an error."""
        if isinstance(error, Abandoned):
            message = "the client went away, or the server stops, before the labels were embedded"
            if time.monotonic() >= self.deadline:
                message = (
                    f"the request's time of {self.seconds:g} s was over before its labels were "
                    "embedded; give it more time, or fewer labels and templates"
                )
            # CANCELLED is 400 over HTTP (2.51).
            self.send(response(message, pb_utils.TritonError.UNAVAILABLE))
        elif isinstance(error, Refusal) and may_be_told(str(error)):
            self.send(response(str(error), error.code))
        else:
            self.send(refused("clip_zero_shot", error))

    def send(self, answer: Any) -> None:
        """Send the one answer."""
        try:
            self.sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            pb_utils.Logger.log_error(f"clip_zero_shot: an answer could not be sent: {error}")


class Refusal(Exception):  # noqa: N818  another model's error, with its code
    """What another model of this server answered instead of a result."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def infer(model: str, source: str, data: NDArray[Any], target: str) -> Any:
    """Ask another model of this server."""
    response = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[target],
        inputs=[pb_utils.Tensor(source, data)],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    ).exec()
    if response.has_error():
        message = re.sub(r"^in ensemble '\w+', ", "", response.error().message())
        raise Refusal(message, response.error().code())
    return pb_utils.get_output_tensor_by_name(response, target).as_numpy()


def texts(request: Any, name: str) -> tuple[str, ...] | None:
    """An input of UTF-8 strings; None of an optional one that is not there."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    found = []
    for index, data in enumerate(tensor.as_numpy().ravel()):
        try:
            found.append(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise TextError(f"{name.lower()}[{index}] is not UTF-8: {error}") from error
    return tuple(found)
