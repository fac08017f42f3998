"""Python model `clip_zero_shot`: classifies images by labels, using the server's other models.

`execute` passes each request to a thread and returns at once; the response is sent when it is
ready. A request that waits for a large label set therefore does not block other requests, although
one process keeps all label sets. (Response senders in models that are not decoupled require Triton
24.07 or later.)
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from serving.bundles.bundle import Bundle
from serving.errors import (
    DeadlineError,
    ImageError,
    InputError,
    OverloadedError,
    UnavailableError,
)
from serving.inputs.labels import LabelSet, refuse_numbers
from serving.inputs.texts import decode_text
from serving.inputs.tokenizer import Tokenizer, each
from serving.limits import MAX_CLASSIFIED, MAX_LABEL_TEXTS
from serving.tasks.zero_shot import softmax
from serving.triton_models.admission import Behind
from serving.triton_models.counters import Counters
from serving.triton_models.label_cache import Abandoned, Full, LabelSetCache, embedding_work, key_of
from serving.triton_models.requests import deadline_s, infer, tensor
from serving.triton_models.responses import Responses
from serving.util.typed_json import parse_json

Floats = NDArray[np.float32]

_IN_FLIGHT = 32  # requests whose images are being embedded; further ones wait in Triton's queue
_WAITING = 512  # requests that wait for the embeddings of their labels; further ones are rejected
_LARGEST_SETS = 2  # label sets of maximum size that are embedded concurrently
_BUSY_S = 0.05  # pause before a busy tower is called again


class ZeroShot:
    """`IMAGE` [n], `LABELS` [labels], `TEMPLATES` -> `PROBABILITIES`, `LOGITS` [n, labels]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle and the settings, and start the threads."""
        parameters = parse_json(args["model_config"])["parameters"]
        settings = {key: int(value["string_value"]) for key, value in parameters.items()}
        bundle = Bundle.open(Path(args["model_repository"], args["model_version"], "bundle"))
        self.manifest = bundle.manifest
        self.tokenizer = Tokenizer(bundle.tokenizer, bundle.manifest.text)
        self.chunk = settings["chunk"]
        self.prefix_tree_chunk = settings["prefix_tree_chunk"]
        self.cache = LabelSetCache(
            settings["cache_bytes"],
            max_texts=_LARGEST_SETS * MAX_LABEL_TEXTS,
            max_waiters=_WAITING,
        )
        self.counters = Counters("clip_zero_shot")
        self.responses = Responses("clip_zero_shot", self.counters)
        self.queue = Behind("clip_zero_shot", settings["max_queue"])
        self.free = threading.Semaphore(_IN_FLIGHT)
        self.threads = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="clip-zero-shot")

    def execute(self, requests: list[Any]) -> None:
        """Start a thread for each request."""
        excess = self.queue.excess(len(requests))
        for index, request in enumerate(requests):
            call = Call(request, self.manifest.logit_scale, self.responses)
            if index < excess:
                call.failed(Full("too many requests wait for the embeddings of their images"))
                continue
            self.free.acquire()
            self.threads.submit(self.begin, call)
        self.queue.done()

    def begin(self, call: "Call") -> None:
        """Embed the images of a request, then answer it or let it wait for its labels."""
        try:
            labels = self.label_set(call.request)
            call.images = self.embed_images(call)
        except Exception as error:  # every error must reach the client
            call.failed(error)
            return
        finally:
            self.free.release()
        key = key_of(self.manifest.provenance.weights_sha256, labels)
        try:
            kept = self.cache.ask(key, lambda: self.work(labels), len(labels), call)
        except Full as error:
            call.failed(error)
            return
        self.counters.label_set("miss" if kept is None else "hit")
        if kept is not None:
            call.ready(kept)

    def label_set(self, request: Any) -> LabelSet:
        """Return the labels and templates of a request."""
        labels, templates = tensor(request, "LABELS", None), tensor(request, "TEMPLATES", None)
        own = self.manifest.templates
        refuse_numbers(
            0 if labels is None else len(labels), len(own if templates is None else templates)
        )
        return LabelSet(
            () if labels is None else texts(labels, "labels"),
            own if templates is None else texts(templates, "templates"),
        )

    def embed_images(self, call: "Call") -> Floats:
        """Embed the images of a request with `clip_image`."""
        images = tensor(call.request, "IMAGE", None)
        # Triton (2.51) does not check the required inputs of a model that has an optional one.
        if images is None or not len(images):
            raise ImageError("no images to classify", advice="give at least one")
        if len(images) > MAX_CLASSIFIED:
            raise ImageError(
                f"{len(images)} images are more than the {MAX_CLASSIFIED} allowed in a request",
                advice="split them into several requests",
            )
        parts = []
        for start in range(0, len(images), self.chunk):
            batch = images[start : start + self.chunk].reshape(-1, 1)
            try:
                parts.append(infer("clip_image", "image", batch, "image_embeds", call.left()))
            except InputError as error:
                raise error.shifted(start) from error
        return np.concatenate(parts)

    def work(self, labels: LabelSet) -> Any:
        """Return the work that embeds a label set.

        It calls the tower directly, because `clip_text` would cache every single text.
        """
        model, chunk = "text_tower", self.chunk
        if self.prefix_tree_chunk:
            model, chunk = "prefix_tree", self.prefix_tree_chunk
        return embedding_work(
            labels,
            self.tokenizer,
            lambda ids: embed_texts(model, ids),
            chunk,
            trees=model == "prefix_tree",
        )

    def finalize(self) -> None:
        """Stop the threads and drop unfinished work."""
        self.threads.shutdown()
        self.cache.close()
        self.counters.close()


class Call:
    """A request until it is answered; implements `serving.triton_models.label_cache.Waiter`."""

    images: Floats

    def __init__(self, request: Any, logit_scale: float, responses: Responses) -> None:
        self.request, self.sender = request, request.get_response_sender()
        self.responses = responses
        self.seconds = deadline_s(request)
        self.deadline = time.monotonic() + self.seconds
        self.logit_scale = np.float32(logit_scale)

    def wanted(self) -> bool:
        """Return whether the deadline has not passed and the client has not canceled."""
        # Triton (2.51) reports canceled requests over gRPC, but not over HTTP.
        return self.left() > 0 and not self.sender.is_cancelled()

    def left(self) -> float:
        """Return the seconds until the deadline; infinite without one."""
        return self.deadline - time.monotonic()

    def ready(self, labels: Floats) -> None:
        """Answer with the probabilities for label embeddings float32 [labels, dim]."""
        try:
            logits = self.logit_scale * (self.images @ labels.T)
            tensors = [
                pb_utils.Tensor("PROBABILITIES", softmax(logits)),
                pb_utils.Tensor("LOGITS", logits),
            ]
        except Exception as error:  # such as MemoryError; the cache's thread must go on
            self.failed(error)
            return
        self.send(self.responses.ok(tensors))

    def failed(self, error: Exception) -> None:
        """Answer with an error."""
        if isinstance(error, Abandoned):
            late = self.left() <= 0
            error = UnavailableError(
                "the client disconnected or the server stopped before the labels were embedded"
            )
            if late:
                error = DeadlineError(
                    f"the deadline of {self.seconds:g} s passed before the labels were embedded",
                    advice="allow more time, or send fewer labels or templates",
                )
        elif isinstance(error, Full):
            error = OverloadedError(f"clip_zero_shot is full: {error}", advice="try again later")
        self.send(self.responses.failed(error))

    def send(self, answer: Any) -> None:
        """Send the only response."""
        try:
            self.sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            pb_utils.Logger.log_error(f"clip_zero_shot: a response could not be sent: {error}")


def embed_texts(model: str, ids: NDArray[np.int32]) -> Floats | None:
    """Return the embeddings of token ids; if the model is overloaded, pause and return None."""
    try:
        embeddings: Floats = infer(model, "input_ids", ids, "text_embeds")
    except (OverloadedError, DeadlineError):
        time.sleep(_BUSY_S)
        return None
    return embeddings


def texts(encoded: NDArray[np.object_], kind: str) -> tuple[str, ...]:
    """Decode UTF-8 strings.

    Raises:
        TextError: one is not valid UTF-8.
    """
    return tuple(each(kind, encoded, decode_text))
