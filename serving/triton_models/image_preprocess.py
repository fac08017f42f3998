"""The model `image_preprocess`: encoded images become pixels, by `serving.inputs.preprocess`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.bundles.bundle import Bundle
from serving.errors import ImageError
from serving.inputs.preprocess import preprocess
from serving.triton_models.admission import Ahead
from serving.triton_models.responses import answered, full


class ImagePreprocess:
    """`image` BYTES [n, 1] -> `pixels` uint8 [n, 3, size, size]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the bundle says of this step."""
        bundle = Path(args["model_repository"], args["model_version"], "bundle")
        self.spec = Bundle.open(bundle).manifest.image
        config = json.loads(args["model_config"])
        self.most = int(config["parameters"]["max_queue"]["string_value"])
        processes = config["instance_group"][0]["count"]
        self.ahead = Ahead("image_tower", self.most, feeders=processes)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; what is wrong with one is its own answer, and nobody else's."""
        room = self.ahead.room(len(requests))
        answers = [answered("image_preprocess", self.respond, each) for each in requests[:room]]
        return answers + full("image_tower", self.most, len(requests) - room)

    def respond(self, request: Any) -> Any:
        """The pixels of one request; its first bad picture raises."""
        pictures = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().ravel()
        pixels = np.empty((len(pictures), 3, self.spec.size, self.spec.size), np.uint8)
        for index, picture in enumerate(pictures):
            try:
                pixels[index] = preprocess(picture, self.spec)
            except ImageError as error:
                raise error.at("images", index) from error
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])
