"""Progress reports of long operations; `serving.cli.console` shows them on a terminal."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Callback that receives the current step and, if known, how much of it is done."""

    def __call__(self, step: str, done: int = 0, total: int = 0) -> None:
        """Report that `done` of `total` items of `step` are done; `total` is 0 if unknown."""


def silent(step: str, done: int = 0, total: int = 0) -> None:
    """Ignore the report; a `Progress` that shows nothing."""


def tracked(progress: Progress, step: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield `items`, and report each of them as progress of `step`."""
    for done, item in enumerate(items):
        progress(step, done, total)
        yield item
    progress(step, total, total)
