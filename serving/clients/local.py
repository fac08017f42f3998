"""The client's calls in this process, without a server."""

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
from serving.inputs.preprocess import Picture, preprocess
from serving.inputs.tokenizer import Tokenizer, batches_by_length
from serving.runners.autotune import fastest, prefix_tree_runner
from serving.runners.base import Embeddings, Runner
from serving.runners.prefix_tree import open_prefix_tree
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec, known, runtime_of
from serving.tasks.zero_shot import ZeroShotClassifier

_TREE_TOKENS = 4096
"""That texts share, from which on they are embedded as trees: the graph for that is opened when it
is first needed, which takes about as long as the text tower takes for so many."""


class LocalClip:
    """Both towers of a bundle; use it in a `with` statement.

    Many texts that begin alike, such as labels in templates, are embedded as trees, where the
    bundle has a graph for that, by a runner that passed the gate with it.

    Args:
        bundle: a directory that `clip-deploy export` made.
        runner: such as `openvino:int8`; `auto` times those that passed the parity gate, here and
            now, and takes the fastest of each tower.
        batch_size: pictures or texts a run; more are cut into several.
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
        self._asked = runner
        self._images = open_runner(self._bundle, "image", self._chosen("image", runner))
        self._texts = open_runner(self._bundle, "text", self._chosen("text", runner))
        self._tokenizer = Tokenizer(self._bundle.tokenizer, self._bundle.manifest.text)
        self._stack = ExitStack()
        self._tree: Runner | None = None

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
        self._tree = None

    def _chosen(self, tower: Tower, runner: str) -> RunnerSpec:
        return fastest(self._bundle, tower) if runner == "auto" else known(runner)

    @cached_property
    def _tree_spec(self) -> RunnerSpec | None:
        return prefix_tree_runner(self._bundle, self._asked, self._texts.spec)

    def _tree_for(self, ids: Ids) -> Runner | None:
        """What embeds `ids` as trees, where that pays."""
        end_id = self._bundle.manifest.text.end_id
        if ids.size < _TREE_TOKENS or shared_tokens(ids, end_id) < _TREE_TOKENS:
            return None
        if self._tree is None and self._tree_spec is not None:
            self._tree = self._stack.enter_context(open_prefix_tree(self._bundle, self._tree_spec))
        return self._tree

    @property
    def identity(self) -> ModelIdentity:
        """Whose embeddings these are."""
        manifest = self._bundle.manifest
        return ModelIdentity(
            name=manifest.name,
            weights_sha256=manifest.provenance.weights_sha256,
            embed_dim=manifest.embed_dim,
        )

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
            out[start:stop] = self._images.run(batch)
        return out

    def embed_texts(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """Texts, in any number -> float32 [n, dim].

        Raises:
            TextError: one of them cannot be used, or is too long and `truncate` is not set.
        """
        rows = self._tokenizer.encode(texts, truncate=truncate) if len(texts) else []
        ids = self._tokenizer.padded(rows, max(map(len, rows), default=0))
        if (tree := self._tree_for(ids)) is not None:
            return tree.run(ids)
        out = self._empty(len(rows))
        for batch in batches_by_length(rows, self._batch_size):
            length = len(rows[batch[-1]])
            # TensorRT prepares every shape that it meets, the others take any length as it comes.
            if runtime_of(self._texts.spec).library is not None:
                length = self._tokenizer.bucket(length)
            out[batch] = self._texts.run(self._tokenizer.padded([rows[i] for i in batch], length))
        return out

    def _empty(self, count: int) -> Embeddings:
        return np.empty((count, self._bundle.manifest.embed_dim), np.float32)

    def classify(
        self,
        images: Sequence[Picture],
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
    ) -> NDArray[np.float32]:
        """Probability of each label for each picture, float32 [n, labels].

        The labels are embedded anew; `ZeroShotClassifier` keeps them.

        Raises:
            ImageError, TextError: one of them cannot be used; the message says which.
        """
        return ZeroShotClassifier(self, labels, templates).classify(images)
