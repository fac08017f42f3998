"""The model `clip_zero_shot`: images and labels become probabilities, by the server's other models.

`execute` hands each request to a thread and returns at once; the answer is sent when it is there.
So a request that waits for a large label set holds up nobody else's, in one process that all label
sets are kept in. (Response senders outside decoupled models: Triton 24.07 and later.)
"""

import json
import math
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
from serving.inputs.tokenizer import Tokenizer, decode_text, each
from serving.limits import MAX_CLASSIFIED, MAX_LABEL_TEXTS
from serving.tasks.zero_shot import softmax
from serving.triton_models.admission import Behind
from serving.triton_models.label_cache import Abandoned, Full, LabelSetCache, embedding_work, key_of
from serving.triton_models.responses import refused
from serving.util.wire import from_text, own_words, triton_fault

Floats = NDArray[np.float32]

_UNDER_WAY = 32  # requests whose pictures are being embedded; more wait in Triton's queue
_WAITING = 512  # requests whose pictures are embedded, and whose labels are not; more are refused
_LARGEST_SETS = 2  # label sets as large as they may be that are under way together
_BUSY_S = 0.05  # until a tower is asked again that was busy


class ZeroShot:
    """`IMAGE` [n], `LABELS` [labels], `TEMPLATES` -> `PROBABILITIES`, `LOGITS` [n, labels]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the bundle says of the model, and the configuration."""
        parameters = json.loads(args["model_config"])["parameters"]
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
        self.queue = Behind("clip_zero_shot", settings["max_queue"])
        self.free = threading.Semaphore(_UNDER_WAY)
        self.threads = ThreadPoolExecutor(_UNDER_WAY, thread_name_prefix="clip-zero-shot")

    def execute(self, requests: list[Any]) -> None:
        """Begin with each request."""
        excess = self.queue.excess(len(requests))
        for index, request in enumerate(requests):
            call = Call(request, self.manifest.logit_scale)
            if index < excess:
                call.failed(Full("too many requests wait for their pictures' embeddings"))
                continue
            self.free.acquire()
            self.threads.submit(self.begin, call)
        self.queue.done()

    def begin(self, call: "Call") -> None:
        """Embed a request's pictures, and answer it, or have it wait for its labels."""
        try:
            labels = self.label_set(call.request)
            call.images = self.embed_images(call)
        except Exception as error:  # whatever it is, the client is to hear of it
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
        if kept is not None:
            call.ready(kept)

    def label_set(self, request: Any) -> LabelSet:
        """The labels and templates of a request."""
        labels, templates = strings(request, "LABELS"), strings(request, "TEMPLATES")
        own = self.manifest.templates
        refuse_numbers(
            0 if labels is None else len(labels), len(own if templates is None else templates)
        )
        return LabelSet(
            () if labels is None else texts(labels, "labels"),
            own if templates is None else texts(templates, "templates"),
        )

    def embed_images(self, call: "Call") -> Floats:
        """Embeddings of a request's pictures, by `clip_image`."""
        pictures = strings(call.request, "IMAGE")
        # Of a model with an optional input, Triton (2.51) counts the inputs and misses none.
        if pictures is None or not len(pictures):
            raise ImageError("no images to classify; give at least one")
        if len(pictures) > MAX_CLASSIFIED:
            raise ImageError(
                f"{len(pictures)} images are more than the {MAX_CLASSIFIED} allowed in a request; "
                "send them in several"
            )
        parts = []
        for start in range(0, len(pictures), self.chunk):
            batch = pictures[start : start + self.chunk].reshape(-1, 1)
            try:
                parts.append(infer("clip_image", "image", batch, "image_embeds", call.left()))
            except InputError as error:
                raise error.shifted(start) from error
        return np.concatenate(parts)

    def work(self, labels: LabelSet) -> Any:
        """What embeds a label set; `clip_text` would cache every single text."""
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
        """Drop what nobody will wait for any more."""
        self.threads.shutdown()
        self.cache.close()


class Call:
    """One request until it is answered; a `serving.triton_models.label_cache.Waiter`."""

    images: Floats

    def __init__(self, request: Any, logit_scale: float) -> None:
        self.request, self.sender = request, request.get_response_sender()
        self.seconds = request.timeout() * 1e-6 or math.inf
        self.deadline = time.monotonic() + self.seconds
        self.logit_scale = np.float32(logit_scale)

    def wanted(self) -> bool:
        """Whether its time is not over, and its client still there, as far as Triton knows."""
        # Over gRPC Triton tells of clients that went away, over HTTP (2.51) it does not.
        return self.left() > 0 and not self.sender.is_cancelled()

    def left(self) -> float:
        """Seconds of its time that are left; infinite if it has all the time."""
        return self.deadline - time.monotonic()

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
            late = self.left() <= 0
            error = UnavailableError(
                "the client went away, or the server stops, before the labels were embedded"
            )
            if late:
                error = DeadlineError(
                    f"the request's time of {self.seconds:g} s was over before its labels were "
                    "embedded",
                    advice="give it more time, or fewer labels and templates",
                )
        elif isinstance(error, Full):
            error = OverloadedError(f"clip_zero_shot is full: {error}", advice="try again later")
        self.send(refused("clip_zero_shot", error))

    def send(self, answer: Any) -> None:
        """Send the one answer."""
        try:
            self.sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            pb_utils.Logger.log_error(f"clip_zero_shot: an answer could not be sent: {error}")


class ModelError(Exception):
    """An error of another model of this server that is none of ours.

    Triton (2.51) passes the code of an error on as internal, whatever it was.
    """


def infer(
    model: str, source: str, data: NDArray[Any], target: str, seconds: float = math.inf
) -> Any:
    """Call another model; `image_preprocess` drops what waits for it longer than `seconds`.

    Raises:
        ClipDeployError: the error of one of our models, with its fields.
        OverloadedError: Triton's queue for the model is full.
        DeadlineError: the request waited for longer than `seconds`.
        ModelError: it failed otherwise.
    """
    response = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[target],
        inputs=[pb_utils.Tensor(source, data)],
        timeout=0 if seconds == math.inf else max(1, int(seconds * 1e6)),
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    ).exec()
    if response.has_error():
        message = own_words(response.error().message())
        if (error := from_text(message)) is not None:
            raise error
        fault = triton_fault(message)
        if fault == "full":
            raise OverloadedError(f"{model} has too much to do", advice="try again later")
        if fault == "late":
            raise DeadlineError(f"the request's time was over while it waited for {model}")
        raise ModelError(f"{model}: {message}")
    return pb_utils.get_output_tensor_by_name(response, target).as_numpy()


def embed_texts(model: str, ids: NDArray[np.int32]) -> Floats | None:
    """Embeddings by a model, or None, after a moment, while that has too much to do."""
    try:
        embeddings: Floats = infer(model, "input_ids", ids, "text_embeds")
    except (OverloadedError, DeadlineError):
        time.sleep(_BUSY_S)
        return None
    return embeddings


def strings(request: Any, name: str) -> NDArray[np.object_] | None:
    """An input of strings, still encoded; None of one that is not there."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().ravel()


def texts(encoded: NDArray[np.object_], kind: str) -> tuple[str, ...]:
    """UTF-8 strings, decoded."""
    return tuple(each(kind, encoded, decode_text))
