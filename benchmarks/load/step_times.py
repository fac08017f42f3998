"""Time per step of an ensemble, from differences of Triton's statistics.

Triton's counters start with the server and cover all clients, so no other client may use the server
during a measurement. Failures are not read, because 2.51 counts each failure of an ensemble twice.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritonclient.utils import InferenceServerException

from benchmarks.load.workload import Model
from serving.clients.endpoint import Endpoint, admin_headers
from serving.errors import ServerError
from serving.util.results import Step
from serving.util.wire import triton_fault

STEPS: Mapping[Model, tuple[str, ...]] = {
    "clip_image": ("image_preprocess", "image_tower"),
    "clip_text": ("text_tokenize", "text_tower"),
}
"""Models of each ensemble, in order."""
_REST_S, _REST_WITHIN_S = 0.1, 5.0
_TIMEOUT_S = 60.0
_COMPUTE = ("compute_input", "compute_infer", "compute_output")

Counters = dict[str, dict[str, int]]
"""Counters by model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Differences of the server's counters between two readings."""

    steps: tuple[Step, ...]
    cache_hits: int
    """Requests that the response cache answered without running a step."""


class Statistics:
    """Reader of a server's statistics.

    Args:
        url: grpc://host:port or http://host:port.
        admin_key: administrative key; servers of `serving.triton.server` require it.
    """

    def __init__(self, url: str, admin_key: str | None) -> None:
        self._url, self._key = url, admin_key

    def at_rest(self) -> Counters:
        """Return the counters once they are stable.

        Triton counts a request shortly after it has sent the response.

        Raises:
            ServerError: the server does not answer, requires a key, or is used by other clients.
        """
        last, deadline = self._read(), time.monotonic() + _REST_WITHIN_S
        while time.monotonic() < deadline:
            time.sleep(_REST_S)
            current = self._read()
            if current == last:
                return current
            last = current
        raise ServerError(
            f"the counters of {self._url} were not stable within {_REST_WITHIN_S:g} s: other "
            "clients use the server",
            advice="measure a server without other clients",
        )

    def _read(self) -> Counters:
        endpoint = Endpoint.of(self._url)
        options: dict[str, Any] = {"as_json": True} if endpoint.protocol == "grpc" else {}
        try:
            with endpoint.open(_TIMEOUT_S) as client:
                headers = admin_headers(endpoint.protocol, self._key)
                answer = client.get_inference_statistics(headers=headers, **options)
        except (InferenceServerException, OSError) as error:
            if triton_fault(str(error)) == "restricted":
                raise ServerError(
                    f"reading the statistics of {self._url} requires its administrative key",
                    advice="give it as --admin-key, or in CLIP_ADMIN_KEY",
                ) from error
            raise ServerError(f"cannot read the statistics of {self._url}: {error}") from error
        return {model["name"]: _counters(model) for model in answer["model_stats"]}


def counted(model: Model, before: Counters, after: Counters) -> Counted:
    """Return the differences for an ensemble and its steps between two readings."""

    def grown(name: str) -> dict[str, int]:
        return {key: value - before[name][key] for key, value in after[name].items()}

    return Counted(
        steps=tuple(_step(name, grown(name)) for name in STEPS[model]),
        cache_hits=grown(model)["cache_hits"],
    )


def _step(name: str, grown: dict[str, int]) -> Step:
    requests = grown["requests"]
    return Step(
        model=name,
        queue_ms=grown["queue_ns"] / 1e6 / max(requests, 1),
        compute_ms=grown["compute_ns"] / 1e6 / max(requests, 1),
        requests=requests,
        mean_batch=grown["inferences"] / max(grown["executions"], 1),
    )


def _counters(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the counters of a model.

    In the JSON form of gRPC, integers are strings and zeros are missing.
    """
    durations = model["inference_stats"]

    def of(name: str, key: str) -> int:
        return int(durations.get(name, {}).get(key, 0))

    return {
        "requests": of("success", "count"),
        "cache_hits": of("cache_hit", "count"),
        "queue_ns": of("queue", "ns"),
        "compute_ns": sum(of(part, "ns") for part in _COMPUTE),
        "inferences": int(model.get("inference_count", 0)),
        "executions": int(model.get("execution_count", 0)),
    }
