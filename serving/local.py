"""The client's calls in this process, without a server."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from serving.bundle import Bundle, Tower
from serving.errors import ImageError, TextError, relocated
from serving.preprocess import Picture, preprocess
from serving.runners.base import Embeddings, open_runner
from serving.selection import passed, time_runners
from serving.tokenizer import Tokenizer
from serving.zero_shot import classify


class LocalClip:
    """Both towers of a bundle; use it in a `with` statement.

    Args:
        bundle: a directory that `python -m export` made.
        runner: see `serving.runners.base.open_runner`; `auto` times those that passed the gate,
            here and now, and takes the fastest of each tower.
        batch_size: pictures or texts a run; more are cut into several.
    """

    def __init__(
        self, bundle: Path, runner: str = "onnxruntime:fp32", *, batch_size: int = 32
    ) -> None:
        self._bundle = Bundle.open(Path(bundle))
        self._batch_size = batch_size
        self._images = open_runner(self._bundle, "image", self._chosen("image", runner))
        self._texts = open_runner(self._bundle, "text", self._chosen("text", runner))
        self._tokenizer = Tokenizer(self._bundle.tokenizer, self._bundle.manifest.text)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._images)
            stack.enter_context(self._texts)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _chosen(self, tower: Tower, runner: str) -> str:
        if runner != "auto":
            return runner
        return time_runners(self._bundle, tower, passed(self._bundle, tower))[0].runner

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with before a softmax."""
        return self._bundle.manifest.logit_scale

    @property
    def templates(self) -> tuple[str, ...]:
        """The checkpoint's own prompts."""
        return self._bundle.manifest.templates

    def embed_images(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Paths, encoded bytes, PIL images or uint8 [h, w, 3] arrays -> float32 [n, dim].

        Raises:
            ImageError: one of them cannot be used; the message says which.
        """
        names = [str(i) if isinstance(i, str | os.PathLike) else "" for i in images]
        spec = self._bundle.manifest.image

        def pixels(index: int) -> NDArray[np.uint8]:
            try:
                return preprocess(images[index], spec)
            except ImageError as error:
                raise ImageError(relocated(str(error), "images", index, names)) from error

        def embed(start: int, stop: int) -> Embeddings:
            return self._images.run(np.stack([pixels(index) for index in range(start, stop)]))

        return self._in_batches(len(images), embed)

    def embed_texts(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """Texts -> float32 [n, dim].

        Raises:
            TextError: one of them cannot be used, or is too long and `truncate` is not set.
        """

        def embed(start: int, stop: int) -> Embeddings:
            try:
                ids = self._tokenizer(texts[start:stop], truncate=truncate)
            except TextError as error:
                names = [""] * len(texts)
                raise TextError(relocated(str(error), "texts", start, names)) from error
            return self._texts.run(ids)

        return self._in_batches(len(texts), embed)

    def _in_batches(self, count: int, embed: Callable[[int, int], Embeddings]) -> Embeddings:
        out = np.empty((count, self._bundle.manifest.embed_dim), np.float32)
        for start in range(0, count, self._batch_size):
            stop = min(start + self._batch_size, count)
            out[start:stop] = embed(start, stop)
        return out

    def classify(
        self,
        images: Sequence[Picture],
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
    ) -> NDArray[np.float32]:
        """Probability of each label for each picture, float32 [n, labels]."""
        return classify(self, images, labels, templates)
