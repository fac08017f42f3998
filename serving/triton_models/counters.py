"""Prometheus counters of the Python models, in the server's own `/metrics`.

    clip_requests_total{model, outcome}       requests of each model, by outcome (`Outcome`)
    clip_image_bytes_total{model}             size of the encoded images
    clip_image_pixels_total{model}            number of decoded pixels: width x height of the images
    clip_text_tokens_total{model}             number of tokens, start and end included, unpadded
    clip_label_cache_requests_total{model, result}    `hit`: the label set was cached; `miss`

Triton's own counters cannot tell a bad input from a fault: every error of a Python model is
`nv_inference_request_failure{reason="OTHER"}`. Requests that Triton itself rejects, because the
queue of `image_preprocess` is full, do not reach a model; they are
`nv_inference_request_failure{reason="REJECTED"}`.

A model adds to its counters in this process, and a thread sends the sums to Triton once a second:
each call takes a round trip between two processes. Triton adds up the instances of a model.
"""

import threading
from collections import Counter
from typing import Any, Literal, get_args

import triton_python_backend_utils as pb_utils

Outcome = Literal["ok", "invalid", "overloaded", "cancelled", "error"]
"""`ok`; `invalid`: the request's own fault; `overloaded`: a queue was full; `cancelled`: the client
disconnected or the deadline passed; `error`: a fault of the server, which its log explains."""
CacheResult = Literal["hit", "miss"]

_INTERVAL_S = 1.0
_HELP = {
    "clip_requests_total": "Requests by outcome: ok, invalid, overloaded, cancelled, error.",
    "clip_image_bytes_total": "Size of the encoded images, in bytes.",
    "clip_image_pixels_total": "Decoded pixels, width x height of each image.",
    "clip_text_tokens_total": "Tokens of the texts, start and end included, without padding.",
    "clip_label_cache_requests_total": "Label sets that were cached (hit) or embedded (miss).",
}

_Series = tuple[str, tuple[tuple[str, str], ...]]


class Counters:
    """Counters of one model. Call `close` at the end.

    Args:
        model: name of the model, the label `model` of every counter.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._pending: Counter[_Series] = Counter()
        self._families: dict[str, Any] = {}
        self._metrics: dict[_Series, Any] = {}
        self._closed = threading.Event()
        for outcome in get_args(Outcome):  # a series that appears with its first event has no rate
            self.requests(outcome, 0)
        self._send()
        self._thread = threading.Thread(target=self._run, name="counters", daemon=True)
        self._thread.start()

    def requests(self, outcome: Outcome, count: int = 1) -> None:
        """Count requests that were answered."""
        self._add("clip_requests_total", count, outcome=outcome)

    def images(self, size: int, pixels: int) -> None:
        """Count decoded images of `size` bytes and `pixels` pixels in total."""
        self._add("clip_image_bytes_total", size)
        self._add("clip_image_pixels_total", pixels)

    def tokens(self, count: int) -> None:
        """Count tokens."""
        self._add("clip_text_tokens_total", count)

    def label_set(self, result: CacheResult) -> None:
        """Count a request for the embeddings of a label set."""
        self._add("clip_label_cache_requests_total", 1, result=result)

    def close(self) -> None:
        """Send what is pending and stop the thread."""
        self._closed.set()
        self._thread.join()
        self._send()

    def _add(self, family: str, amount: int, **labels: str) -> None:
        with self._lock:
            self._pending[family, (("model", self._model), *labels.items())] += amount

    def _run(self) -> None:
        while not self._closed.wait(_INTERVAL_S):
            self._send()

    def _send(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, Counter()
        for series, amount in pending.items():
            try:
                self._metric(series).increment(amount)
            except Exception as error:  # a server without metrics; counting must not fail a request
                pb_utils.Logger.log_warn(f"{series[0]} of {self._model} is not counted: {error}")

    def _metric(self, series: _Series) -> Any:
        name, labels = series
        if series not in self._metrics:
            if name not in self._families:
                self._families[name] = pb_utils.MetricFamily(
                    name=name, description=_HELP[name], kind=pb_utils.MetricFamily.COUNTER
                )
            self._metrics[series] = self._families[name].Metric(labels=dict(labels))
        return self._metrics[series]
