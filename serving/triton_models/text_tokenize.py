"""The model `text_tokenize`: strings become token ids, by `serving.inputs.tokenizer`."""

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from serving.bundles.bundle import Bundle
from serving.inputs.tokenizer import Tokenizer, decode_text, each
from serving.triton_models.admission import Ahead, Behind
from serving.triton_models.responses import answered, full


class TextTokenize:
    """`text` BYTES [n, 1], UTF-8 -> `input_ids` int32 [n, length]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the bundle says of this step."""
        bundle = Bundle.open(Path(args["model_repository"], args["model_version"], "bundle"))
        self.tokenizer = Tokenizer(bundle.tokenizer, bundle.manifest.text)
        parameters = json.loads(args["model_config"])["parameters"]
        self.most = int(parameters["max_queue"]["string_value"])
        self.behind = Behind("text_tokenize", self.most)
        self.ahead = Ahead("text_tower", self.most)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; what is wrong with one is its own answer, and nobody else's."""
        excess = self.behind.excess(len(requests))
        end = excess + self.ahead.room(len(requests) - excess)
        answers = full("text_tokenize", self.most, excess)
        answers += [answered("text_tokenize", self.respond, each) for each in requests[excess:end]]
        answers += full("text_tower", self.most, len(requests) - end)
        self.behind.done()
        return answers

    def respond(self, request: Any) -> Any:
        """The token ids of one request; its first bad text raises."""
        raw = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().ravel()
        truncate = bool(json.loads(request.parameters()).get("truncate", False))
        texts = each("texts", raw, decode_text)
        ids = self.tokenizer(texts, truncate=truncate)
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", ids)])
