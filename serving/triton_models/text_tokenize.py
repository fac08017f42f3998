"""Python model `text_tokenize`: converts strings to token ids."""

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from serving.bundles.bundle import Bundle
from serving.inputs.texts import decode_text
from serving.inputs.tokenizer import Tokenizer, each
from serving.triton_models.admission import Ahead, Behind
from serving.triton_models.counters import Counters
from serving.triton_models.requests import required
from serving.triton_models.responses import Responses
from serving.util.typed_json import parse_json


class TextTokenize:
    """`text` BYTES [n, 1], UTF-8 -> `input_ids` or `truncated_ids` int32 [n, length].

    A text that is too long is truncated if the request asks for `truncated_ids` only. Ensembles
    request the outputs that they use. A request parameter would not do: the key of Triton's
    response cache does not include parameters.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer of the bundle."""
        bundle = Bundle.open(Path(args["model_repository"], args["model_version"], "bundle"))
        self.tokenizer = Tokenizer(bundle.tokenizer, bundle.manifest.text)
        parameters = parse_json(args["model_config"])["parameters"]
        self.max_queue = int(parameters["max_queue"]["string_value"])
        self.behind = Behind("text_tokenize", self.max_queue)
        self.ahead = Ahead("text_tower", self.max_queue)
        self.counters = Counters("text_tokenize")
        self.responses = Responses("text_tokenize", self.counters)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request; a bad request does not affect the others."""
        excess = self.behind.excess(len(requests))
        end = excess + self.ahead.room(len(requests) - excess)
        answers = self.responses.full("text_tokenize", self.max_queue, excess)
        answers += [self.responses.of(self.respond, request) for request in requests[excess:end]]
        answers += self.responses.full("text_tower", self.max_queue, len(requests) - end)
        self.behind.done()
        return answers

    def respond(self, request: Any) -> list[Any]:
        """Return the token ids of one request.

        Raises:
            TextError: the first text that cannot be tokenized or is too long.
        """
        outputs = request.requested_output_names()
        truncate = "input_ids" not in outputs
        raw = required(request, "text", None, 1).ravel()
        texts = each("texts", raw, lambda data: decode_text(data, truncate=truncate))
        rows = self.tokenizer.encode(texts, truncate=truncate)
        lengths = list(map(len, rows))
        ids = self.tokenizer.padded(rows, self.tokenizer.bucket(max(lengths)))
        self.counters.tokens(sum(lengths))
        return [pb_utils.Tensor(name, ids) for name in outputs]

    def finalize(self) -> None:
        """Send the last counts."""
        self.counters.close()
