"""Encoded pictures -> pixels: `serving.preprocess` behind Triton's Python backend."""

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.bundle import Bundle
from serving.errors import ImageError
from serving.preprocess import preprocess


class TritonPythonModel:
    """`image` BYTES [n, 1] -> `pixels` uint8 [n, 3, size, size]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the bundle says of this step."""
        bundle = Path(args["model_repository"], args["model_version"], "bundle")
        self.spec = Bundle.open(bundle).manifest.image

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request."""
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        """Answer one request; its first bad picture is its answer, and nobody else's."""
        pictures = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().ravel()
        pixels = np.empty((len(pictures), 3, self.spec.size, self.spec.size), np.uint8)
        for index, picture in enumerate(pictures):
            try:
                pixels[index] = preprocess(picture, self.spec)
            except ImageError as error:
                message = f"images[{index}]: {error}"
                return pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
                )
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])
