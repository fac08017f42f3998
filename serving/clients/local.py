"""Client that runs a bundle in this process, without a server."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from serving.bundles.bundle import Bundle
from serving.bundles.identity import ModelIdentity
from serving.bundles.manifest import Tower
from serving.errors import ImageError
from serving.inputs.prefix_tree import Ids, shared_tokens
from serving.inputs.preprocess import ImageInput, preprocess
from serving.inputs.tokenizer import Tokenizer, batches_by_length
from serving.runners.autotune import fastest, prefix_tree_runner
from serving.runners.base import Embeddings, Runner
from serving.runners.prefix_tree import open_prefix_tree
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec, known, runtime_of
from serving.tasks.zero_shot import ZeroShotClassifier

_TREE_TOKENS = 4096
"""Minimum number of tokens in shared prefixes for embedding texts as prefix trees. The prefix-tree
graph is opened on first use, which takes about as long as the text tower takes for so many tokens.
"""


class LocalClip:
    """Both towers of a bundle in this process; a context manager.

    Many texts with shared prefixes, such as labels in prompt templates, are embedded as prefix
    trees if the bundle has a prefix-tree graph and a runner passed the parity gate with it.

    Args:
        bundle: directory that `clip-deploy export` wrote.
        runner: name of a runner, such as `openvino:int8`. `auto` times those that passed the parity
            gate on this machine and takes the fastest for each tower.
        batch_size: images or texts per run; longer inputs are split.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        runner: str = "onnxruntime:fp32",
        *,
        batch_size: int = 32,
    ) -> None:
        self._bundle = Bundle.open(Path(bundle))
        self._batch_size = batch_size
        self._requested_runner = runner
        self._image_runner = open_runner(self._bundle, "image", self._spec("image", runner))
        self._text_runner = open_runner(self._bundle, "text", self._spec("text", runner))
        self._tokenizer = Tokenizer(self._bundle.tokenizer, self._bundle.manifest.text)
        self._stack = ExitStack()
        self._tree: Runner | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._image_runner)
            stack.enter_context(self._text_runner)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._tree = None

    def _spec(self, tower: Tower, runner: str) -> RunnerSpec:
        return fastest(self._bundle, tower) if runner == "auto" else known(runner)

    @cached_property
    def _tree_spec(self) -> RunnerSpec | None:
        return prefix_tree_runner(self._bundle, self._requested_runner, self._text_runner.spec)

    def _tree_for(self, ids: Ids) -> Runner | None:
        """Return the prefix-tree runner, or None if `ids` share too few tokens to benefit."""
        end_id = self._bundle.manifest.text.end_id
        if ids.size < _TREE_TOKENS or shared_tokens(ids, end_id) < _TREE_TOKENS:
            return None
        if self._tree is None and self._tree_spec is not None:
            self._tree = self._stack.enter_context(open_prefix_tree(self._bundle, self._tree_spec))
        return self._tree

    @property
    def identity(self) -> ModelIdentity:
        """Model that the embeddings belong to."""
        manifest = self._bundle.manifest
        return ModelIdentity(
            name=manifest.name,
            weights_sha256=manifest.provenance.weights_sha256,
            embed_dim=manifest.embed_dim,
        )

    @property
    def logit_scale(self) -> float:
        """Factor of the cosines before a softmax."""
        return self._bundle.manifest.logit_scale

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates of the checkpoint."""
        return self._bundle.manifest.templates

    def embed_images(self, images: Sequence[ImageInput]) -> NDArray[np.float32]:
        """Embed images.

        Args:
            images: paths, encoded bytes, PIL images, or uint8 RGB arrays [height, width, 3].

        Returns:
            float32 [n, dim], unit length.

        Raises:
            ImageError: an image cannot be used; the error says which and why.
        """
        spec = self._bundle.manifest.image

        def pixels(index: int) -> NDArray[np.uint8]:
            try:
                return preprocess(images[index], spec)
            except ImageError as error:
                raise error.at("images", index) from error

        out = self._empty(len(images))
        for start in range(0, len(images), self._batch_size):
            stop = min(start + self._batch_size, len(images))
            batch = np.stack([pixels(index) for index in range(start, stop)])
            out[start:stop] = self._image_runner.run(batch)
        return out

    def embed_texts(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: any number of texts.
            truncate: cut texts that are too long instead of raising an error.

        Returns:
            float32 [n, dim], unit length.

        Raises:
            TextError: a text cannot be used; the error says which and why.
        """
        rows = self._tokenizer.encode(texts, truncate=truncate) if len(texts) else []
        ids = self._tokenizer.padded(rows, max(map(len, rows), default=0))
        if (tree := self._tree_for(ids)) is not None:
            return tree.run(ids)
        out = self._empty(len(rows))
        for batch in batches_by_length(rows, self._batch_size):
            length = len(rows[batch[-1]])
            # TensorRT prepares an execution context per shape; other runtimes take any length.
            if runtime_of(self._text_runner.spec).library is not None:
                length = self._tokenizer.bucket(length)
            ids = self._tokenizer.padded([rows[i] for i in batch], length)
            out[batch] = self._text_runner.run(ids)
        return out

    def _empty(self, count: int) -> Embeddings:
        return np.empty((count, self._bundle.manifest.embed_dim), np.float32)

    def classify(
        self,
        images: Sequence[ImageInput],
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
    ) -> NDArray[np.float32]:
        """Return the probability of each label for each image, float32 [n, labels].

        Every call embeds the labels; `ZeroShotClassifier` embeds them once.

        Raises:
            ImageError: an image cannot be used; the error says which and why.
            TextError: labels or templates cannot be used; the error says which and why.
        """
        return ZeroShotClassifier(self, labels, templates).classify(images)
