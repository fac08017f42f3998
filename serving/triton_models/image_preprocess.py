"""Python model `image_preprocess`: decodes, resizes and crops encoded images."""

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.bundles.bundle import Bundle
from serving.errors import ImageError
from serving.inputs.preprocess import preprocess
from serving.triton_models.admission import Ahead
from serving.triton_models.responses import answered, full
from serving.util.typed_json import parse_json


class ImagePreprocess:
    """`image` BYTES [n, 1] -> `pixels` uint8 [n, 3, size, size]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the image specification of the bundle."""
        bundle = Path(args["model_repository"], args["model_version"], "bundle")
        self.spec = Bundle.open(bundle).manifest.image
        config = parse_json(args["model_config"])
        self.max_queue = int(config["parameters"]["max_queue"]["string_value"])
        processes = config["instance_group"][0]["count"]
        self.ahead = Ahead("image_tower", self.max_queue, feeders=processes)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request; a bad request does not affect the others."""
        room = self.ahead.room(len(requests))
        answers = [answered("image_preprocess", self.respond, each) for each in requests[:room]]
        return answers + full("image_tower", self.max_queue, len(requests) - room)

    def respond(self, request: Any) -> Any:
        """Return the response with the pixels of one request.

        Raises:
            ImageError: the first image that cannot be decoded.
        """
        images = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().ravel()
        pixels = np.empty((len(images), 3, self.spec.size, self.spec.size), np.uint8)
        for index, image in enumerate(images):
            try:
                pixels[index] = preprocess(image, self.spec)
            except ImageError as error:
                raise error.at("images", index) from error
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])
