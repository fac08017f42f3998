"""Python models that decode, resize and crop encoded images.

`image_preprocess` passes requests with large images to `image_preprocess_large`, which has few
processes. An image of `MAX_PIXELS` takes seconds and up to 1 GB of memory to decode. Without the
second model, a few of them would keep all processes busy while everyone else waits.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from serving.bundles.bundle import Bundle
from serving.errors import DeadlineError, ImageError, OverloadedError, UnavailableError
from serving.inputs.decode import Header, open_image
from serving.inputs.preprocess import to_pixels
from serving.limits import LARGE_PIXELS, LARGE_REQUEST_PIXELS
from serving.triton_models.admission import Ahead
from serving.triton_models.counters import Counters
from serving.triton_models.requests import deadline_s, infer, required
from serving.triton_models.responses import Responses
from serving.util.typed_json import parse_json

_LARGE = "image_preprocess_large"


class _Preprocess:
    """`image` BYTES [n, 1] -> `pixels` uint8 [n, 3, size, size]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the image specification of the bundle."""
        bundle = Path(args["model_repository"], args["model_version"], "bundle")
        self.spec = Bundle.open(bundle).manifest.image
        self.config = parse_json(args["model_config"])
        self.counters = Counters(self.config["name"])
        self.responses = Responses(self.config["name"], self.counters)

    def headers(self, raw: NDArray[np.object_]) -> list[Header | ImageError]:
        """Read the headers of encoded images; one that cannot be read is an error."""
        headers: list[Header | ImageError] = []
        for data in raw:
            try:
                headers.append(open_image(data, exif_orientation=self.spec.exif_orientation))
            except ImageError as error:  # reported after the images before it were decoded
                headers.append(error)
        return headers

    def pixels(self, raw: NDArray[np.object_], headers: list[Header | ImageError]) -> list[Any]:
        """Return the output with the pixels of images whose headers were read.

        Raises:
            ImageError: the first image that cannot be decoded.
        """
        pixels = np.empty((len(headers), 3, self.spec.size, self.spec.size), np.uint8)
        decoded = 0
        for index, header in enumerate(headers):
            try:
                if isinstance(header, ImageError):
                    raise header
                pixels[index] = to_pixels(header.decode(), self.spec)
            except ImageError as error:
                raise error.at("images", index) from error
            decoded += header.pixels
            header.image.close()  # frees the memory of its pixels
        self.counters.images(sum(map(len, raw)), decoded)
        return [pb_utils.Tensor("pixels", pixels)]

    def finalize(self) -> None:
        """Send the last counts."""
        self.counters.close()


class ImagePreprocess(_Preprocess):
    """Model `image_preprocess`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the image specification of the bundle, and start the thread for large images."""
        super().initialize(args)
        settings = {k: int(v["string_value"]) for k, v in self.config["parameters"].items()}
        self.max_queue, self.max_large = settings["max_queue"], settings["max_large"]
        processes = self.config["instance_group"][0]["count"]
        self.ahead = Ahead("image_tower", self.max_queue, feeders=processes)
        self.room_for_large = threading.Semaphore(self.max_large)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="large-images")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request, or None if another thread will send it.

        A bad request does not affect the others.
        """
        room = self.ahead.room(len(requests))
        answers = [self.responses.of(self.respond, request) for request in requests[:room]]
        return answers + self.responses.full("image_tower", self.max_queue, len(requests) - room)

    def respond(self, request: Any) -> list[Any] | None:
        """Return the pixels of a request's images; None if they are large and were passed on."""
        raw = required(request, "image", None, 1).ravel()
        headers = self.headers(raw)
        if not _are_large(headers):
            return self.pixels(raw, headers)
        if not self.room_for_large.acquire(blocking=False):
            raise OverloadedError(
                f"{_LARGE} is full: {self.max_large} requests with large images wait for it",
                advice="try again later, or scale the images down first",
            )
        deadline = time.monotonic() + deadline_s(request)
        self.thread.submit(self.forward, request.get_response_sender(), raw, deadline)
        return None

    def forward(self, sender: Any, raw: NDArray[np.object_], deadline: float) -> None:
        """Pass a request to the model for large images, and send its response."""
        try:
            if sender.is_cancelled():
                raise UnavailableError("the client disconnected before its images were decoded")
            if (left := deadline - time.monotonic()) <= 0:
                raise DeadlineError(f"the deadline passed while the request waited for {_LARGE}")
            pixels = infer(_LARGE, "image", raw.reshape(-1, 1), "pixels", left)
            response = self.responses.ok([pb_utils.Tensor("pixels", pixels)])
        except Exception as error:
            response = self.responses.failed(error)
        finally:
            self.room_for_large.release()
        try:
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            pb_utils.Logger.log_error(f"image_preprocess: a response could not be sent: {error}")

    def finalize(self) -> None:
        """Finish the requests in the thread, and send the last counts."""
        self.thread.shutdown()
        super().finalize()


class LargeImagePreprocess(_Preprocess):
    """Model `image_preprocess_large`, called by `image_preprocess` only."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request."""
        return [self.responses.of(self.respond, request) for request in requests]

    def respond(self, request: Any) -> list[Any]:
        """Return the pixels of a request's images."""
        raw = required(request, "image", None, 1).ravel()
        return self.pixels(raw, self.headers(raw))


def _are_large(headers: list[Header | ImageError]) -> bool:
    pixels = [header.pixels for header in headers if isinstance(header, Header)]
    return max(pixels, default=0) > LARGE_PIXELS or sum(pixels) > LARGE_REQUEST_PIXELS
