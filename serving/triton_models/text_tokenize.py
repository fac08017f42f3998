"""Python model `text_tokenize`: converts strings to token ids."""

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from serving.bundles.bundle import Bundle
from serving.inputs.texts import decode_text
from serving.inputs.tokenizer import Tokenizer, each
from serving.triton_models.admission import Ahead, Behind
from serving.triton_models.responses import answered, full


class TextTokenize:
    """`text` BYTES [n, 1], UTF-8 -> `input_ids` int32 [n, length]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer of the bundle."""
        bundle = Bundle.open(Path(args["model_repository"], args["model_version"], "bundle"))
        self.tokenizer = Tokenizer(bundle.tokenizer, bundle.manifest.text)
        parameters = json.loads(args["model_config"])["parameters"]
        self.max_queue = int(parameters["max_queue"]["string_value"])
        self.behind = Behind("text_tokenize", self.max_queue)
        self.ahead = Ahead("text_tower", self.max_queue)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request; a bad request does not affect the others."""
        excess = self.behind.excess(len(requests))
        end = excess + self.ahead.room(len(requests) - excess)
        answers = full("text_tokenize", self.max_queue, excess)
        answers += [answered("text_tokenize", self.respond, each) for each in requests[excess:end]]
        answers += full("text_tower", self.max_queue, len(requests) - end)
        self.behind.done()
        return answers

    def respond(self, request: Any) -> Any:
        """Return the response with the token ids of one request.

        Raises:
            TextError: the first text that cannot be tokenized or is too long.
        """
        raw = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().ravel()
        truncate = bool(json.loads(request.parameters()).get("truncate", False))
        texts = each("texts", raw, lambda data: decode_text(data, truncate=truncate))
        ids = self.tokenizer(texts, truncate=truncate)
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", ids)])
