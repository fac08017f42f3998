"""Client that runs a bundle in this process, without a server."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from serving.bundles.bundle import Bundle
from serving.bundles.identity import ModelIdentity
from serving.bundles.manifest import TOWERS, Tower
from serving.clients import forks
from serving.errors import ImageError, RunnerError, TextError
from serving.inputs.images import Fetch, Images, each_image
from serving.inputs.prefix_tree import Ids, shared_tokens
from serving.inputs.preprocess import preprocess
from serving.inputs.texts import Texts, each_text
from serving.inputs.tokenizer import Tokenizer, batches_by_length
from serving.runners.autotune import fastest, prefix_tree_runner
from serving.runners.base import Embeddings, Runner
from serving.runners.prefix_tree import open_prefix_tree
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec, known, runtime_of
from serving.tasks.zero_shot import ZeroShotClassifier
from serving.util.finite import check_count

_TREE_TOKENS = 4096
"""Minimum number of tokens in shared prefixes for embedding texts as prefix trees. The prefix-tree
graph is opened on first use, which takes about as long as the text tower takes for so many tokens.
"""

_TEXTS = 8192
"""Texts that are tokenized at a time, which bounds the memory of an iterator's texts."""


class LocalClip:
    """Both towers of a bundle in this process; a context manager.

    Many texts with shared prefixes, such as labels in prompt templates, are embedded as prefix
    trees if the bundle has a prefix-tree graph and a runner passed the parity gate with it.

    The runtimes' threads do not survive a fork: open it in the process that uses it.

    Args:
        bundle: directory that `clip-deploy export` wrote.
        runner: name of a runner, such as `openvino:int8`. `auto` times those that passed the parity
            gate on this machine and takes the fastest for each tower.
        batch_size: images or texts per run; longer inputs are split.
        fetch: function that downloads images given as http:// or https:// URLs. By default, URLs
            are an error.
        exif_orientation: rotate and mirror images as their EXIF orientation says, which the
            reference pipelines ignore.
        scale_16_bit: scale 16-bit grayscale images to 8 bits, which the reference pipelines clip.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        runner: str = "onnxruntime:fp32",
        *,
        batch_size: int = 32,
        fetch: Fetch | None = None,
        exif_orientation: bool = False,
        scale_16_bit: bool = False,
    ) -> None:
        check_count("batch_size", batch_size)
        self._bundle = Bundle.open(Path(bundle))
        image = self._bundle.manifest.image
        self._image_spec = replace(
            image,
            exif_orientation=exif_orientation or image.exif_orientation,
            scale_16_bit=scale_16_bit or image.scale_16_bit,
        )
        self._fetch, self._forked, self._inherited = fetch, False, list[Any]()
        self._batch_size = batch_size
        self._requested_runner = runner
        self._open_runners()
        self._tokenizer = Tokenizer(self._bundle.tokenizer, self._bundle.manifest.text)
        self._stack = ExitStack()

    def _open_runners(self) -> None:
        image, text = (self._spec(tower, self._requested_runner) for tower in TOWERS)
        self._image_runner = open_runner(self._bundle, "image", image)
        self._text_runner = open_runner(self._bundle, "text", text)
        self._tree: Runner | None = None

    def __enter__(self) -> Self:
        if self._forked:
            self._open_runners()
        with ExitStack() as stack:
            stack.enter_context(self._image_runner)
            stack.enter_context(self._text_runner)
            self._stack = stack.pop_all()
        self._forked = False
        forks.watch(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._tree = None

    def after_fork(self) -> None:
        """Record that this process cannot use the runners."""
        # Kept, because closing them could wait for their threads forever.
        self._inherited += [self._stack, self._image_runner, self._text_runner, self._tree]
        self._stack, self._forked = ExitStack(), True

    def _check_process(self) -> None:
        if self._forked:
            raise RunnerError(
                "this LocalClip was opened before the process was forked, and its runners' threads "
                "exist only in the parent process",
                advice="open it in the forked process, or start processes by multiprocessing's "
                "'spawn' method",
            )

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

    def embed_images(self, images: Images) -> NDArray[np.float32]:
        """Embed images.

        Args:
            images: any number of images, or one; see `serving.inputs.images.ImageInput`.

        Returns:
            float32 [n, dim], unit length.

        Raises:
            ImageError: an image cannot be used; the error says which and why.
        """
        self._check_process()
        parts, items, count = [self._empty(0)], each_image(images), 0
        while batch := list(islice(items, self._batch_size)):
            pixels = []
            for index, image in enumerate(batch, count):
                try:
                    pixels.append(preprocess(image, self._image_spec, self._fetch))
                except ImageError as error:
                    raise error.at("images", index) from error
            parts.append(self._image_runner.run(np.stack(pixels)))
            count += len(batch)
        return np.concatenate(parts)

    def embed_texts(self, texts: Texts, *, truncate: bool = False) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: any number of texts, or one.
            truncate: cut texts that are too long instead of raising an error; see
                `serving.inputs.tokenizer.Tokenizer`.

        Returns:
            float32 [n, dim], unit length.

        Raises:
            TextError: a text cannot be used; the error says which and why.
        """
        self._check_process()
        parts, items, count = [self._empty(0)], each_text(texts), 0
        while batch := list(islice(items, _TEXTS)):
            try:
                rows = self._tokenizer.encode(batch, truncate=truncate)
            except TextError as error:
                raise error.shifted(count) from error
            parts.append(self._embed_rows(rows))
            count += len(batch)
        return np.concatenate(parts)

    def _embed_rows(self, rows: list[list[int]]) -> Embeddings:
        ids = self._tokenizer.padded(rows, max(map(len, rows)))
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
        images: Images,
        labels: Iterable[str],
        templates: Iterable[str] | None = None,
    ) -> NDArray[np.float32]:
        """Return the probability of each label for each image, float32 [n, labels].

        Every call embeds the labels; `ZeroShotClassifier` embeds them once.

        Args:
            images: as for `embed_images`.
            labels: distinct labels. A single str is an error, because it is more often a mistake
                than a label set of one.
            templates: prompt templates; default: those of the checkpoint.

        Raises:
            ImageError: an image cannot be used; the error says which and why.
            TextError: labels or templates cannot be used; the error says which and why.
        """
        return ZeroShotClassifier(self, labels, templates).classify(images)
