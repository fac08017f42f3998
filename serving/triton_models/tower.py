"""Python models of the towers: run batches of requests through a runner.

Imported only inside Triton's Python stub, which provides `triton_python_backend_utils`.
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWER_OF, Graph, TextSpec
from serving.errors import TextError
from serving.inputs.tokenizer import runs_by_length
from serving.runners.base import Batch
from serving.runners.prefix_tree import open_prefix_tree
from serving.runners.registry import open_runner
from serving.triton_models.admission import Behind
from serving.triton_models.counters import Counters
from serving.triton_models.requests import required
from serving.triton_models.responses import Responses
from serving.util.typed_json import parse_json


class TowerModel:
    """Base of the tower models: `pixels` or `input_ids` -> embeddings float32 [n, dim]."""

    graph: ClassVar[Graph]

    def initialize(self, args: dict[str, str]) -> None:
        """Open the runner that assembly selected, and warm it up on typical shapes."""
        config = parse_json(args["model_config"])
        self._name = config["name"]
        bundle = Bundle.open(Path(args["model_repository"], args["model_version"], "bundle"))
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        self._text = bundle.manifest.text if TOWER_OF[self.graph] == "text" else None
        name = config["parameters"]["runner"]["string_value"]
        self._max_queue = int(config["parameters"]["max_queue"]["string_value"])
        self._queue = Behind(self._name, self._max_queue)
        self._counters = Counters(self._name)
        self._responses = Responses(self._name, self._counters)
        if self.graph == "prefix_tree":
            self._runner = open_prefix_tree(bundle, name).__enter__()
        else:
            self._runner = open_runner(bundle, self.graph, name).__enter__()
        size = bundle.manifest.image.size
        self._dims = (None, 3, size, size) if self._text is None else (None, None)
        for count in (1, min(8, config["max_batch_size"])):
            if self._text is None:
                self._runner.run(np.zeros((count, 3, size, size), np.uint8))
                continue
            for length in self._text.buckets:
                self._runner.run(np.full((count, length), self._text.end_id, np.int32))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request.

        Valid requests are joined into as few runs as is worthwhile; an invalid request gets its own
        error response.
        """
        excess = self._queue.excess(len(requests))
        answers = self._responses.full(self._name, self._max_queue, excess)
        answers += [None] * (len(requests) - excess)
        good, batches = [], []
        for index, request in enumerate(requests[excess:], excess):
            try:
                batch = required(request, self._input, *self._dims)
                if self._text is not None:
                    check_ids(batch, self._text)
            except Exception as error:  # raised from here, it would fail the whole batch
                answers[index] = self._responses.failed(error)
                continue
            good.append(index)
            batches.append(batch)
        # Texts of different lengths arrive together (allow_ragged_batch); images have one shape.
        runs = [list(range(len(batches)))] if batches else []
        if self._text is not None:
            runs = runs_by_length([(len(batch), batch.shape[1]) for batch in batches])
        for run in runs:
            for place, answer in zip(run, self._run([batches[i] for i in run]), strict=True):
                answers[good[place]] = answer
        self._queue.done()
        return answers

    def _run(self, batches: list[Any]) -> list[Any]:
        """Return the responses to requests of one run; if it fails, run each request on its own."""
        try:
            embeddings = self._runner.run(self._joined(batches))
            parts = np.split(embeddings, np.cumsum([len(batch) for batch in batches])[:-1])
            return [self._responses.ok([pb_utils.Tensor(self._output, part)]) for part in parts]
        except Exception as error:
            if len(batches) == 1:
                return [self._responses.failed(error)]
        return [answer for batch in batches for answer in self._run([batch])]

    def _joined(self, batches: list[Any]) -> Any:
        if len(batches) == 1:
            return batches[0]
        if self._text is None:
            return np.concatenate(batches)
        length = max(batch.shape[1] for batch in batches)
        joined = np.full((sum(map(len, batches)), length), self._text.pad_id, np.int32)
        start = 0
        for batch in batches:
            joined[start : start + len(batch), : batch.shape[1]] = batch
            start += len(batch)
        return joined

    def finalize(self) -> None:
        """Close the runner and send the last counts."""
        self._counters.close()
        self._runner.__exit__(None, None, None)


def check_ids(ids: Batch, spec: TextSpec) -> None:
    """Check token ids: bad ones would fail the whole batch, or pool the wrong token.

    Raises:
        TextError: the texts are too long, an id is not in the vocabulary, or a text has no
            end-of-text token.
    """
    if not 2 <= ids.shape[1] <= spec.context_length:
        raise TextError(
            f"input_ids have {ids.shape[1]} tokens per text; expected 2 to {spec.context_length}"
        )
    if ids.min() < 0 or ids.max() >= spec.vocab_size:
        raise TextError(
            f"input_ids range from {ids.min()} to {ids.max()}; expected 0 to {spec.vocab_size - 1}"
        )
    if not (ids == spec.end_id).any(axis=1).all():
        raise TextError(f"input_ids of a text lack the end-of-text token {spec.end_id}")
