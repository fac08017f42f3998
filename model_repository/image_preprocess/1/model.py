"""Encoded pictures -> pixels: `serving.preprocess` behind Triton's Python backend."""

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.answers import answered
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
        """Answer each request; what is wrong with one is its own answer, and nobody else's."""
        return [answered("image_preprocess", self.respond, request) for request in requests]

    def respond(self, request: Any) -> Any:
        """The pixels of one request; its first bad picture raises."""
        pictures = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().ravel()
        pixels = np.empty((len(pictures), 3, self.spec.size, self.spec.size), np.uint8)
        for index, picture in enumerate(pictures):
            try:
                pixels[index] = preprocess(picture, self.spec)
            except ImageError as error:
                raise ImageError(f"images[{index}]: {error}") from error
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])
