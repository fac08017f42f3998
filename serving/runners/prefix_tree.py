"""Runner of the text tower's prefix-tree graph, for texts with shared prefixes such as prompts."""

from types import TracebackType
from typing import Self

import numpy as np

from serving.bundles.bundle import Bundle
from serving.errors import RunnerError
from serving.inputs.prefix_tree import trees
from serving.runners.base import Batch, Embeddings, Runner
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec


class PrefixTreeRunner:
    """A `Runner` of the text tower that arranges any number of texts in trees for `inner`.

    Args:
        inner: runner of the prefix-tree graph; its batches are trees, see
            `serving.inputs.prefix_tree`.
        end_id: the end-of-text token.
    """

    def __init__(self, inner: Runner, end_id: int) -> None:
        self.spec, self.name = inner.spec, inner.name
        self.runtime_version = inner.runtime_version
        self._inner = inner
        self._end_id = end_id

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inner.__exit__(kind, error, trace)

    def run(self, batch: Batch) -> Embeddings:
        """Embed `input_ids` int32 [n, length], n >= 1.

        Returns:
            float32 [n, dim], in the order of the texts.

        Raises:
            RunnerError: `inner` cannot run the trees, or a text has no end-of-text token.
        """
        texts, parts = [], []
        try:
            for tree in trees(batch.astype(np.int32, copy=False), self._end_id):
                parts.append(self._inner.run(tree.nodes)[tree.leaves])
                texts.append(tree.texts)
        except (ValueError, IndexError) as error:
            raise RunnerError(
                f"{self.name} cannot run {batch.dtype} {list(batch.shape)} as trees: {error}"
            ) from error
        found = np.concatenate(parts)
        embeddings: Embeddings = np.empty_like(found)
        embeddings[np.concatenate(texts)] = found
        return embeddings


def open_prefix_tree(bundle: Bundle, runner: RunnerSpec | str) -> Runner:
    """Return a runner of the text tower's prefix-tree graph, not yet entered.

    Raises:
        RunnerError: the runner is unknown, does not run trees, or is not available here.
        BundleError: the bundle has no prefix-tree graph in this precision, or the file differs from
            the exported one.
    """
    inner = open_runner(bundle, "prefix_tree", runner)
    return PrefixTreeRunner(inner, bundle.manifest.text.end_id)
