"""How long work reports what it is doing; `serving.cli.console` shows it on a terminal."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Receives the current step, and how much of it is done where that is known."""

    def __call__(self, step: str, done: int = 0, total: int = 0) -> None:
        """Report `step`."""


def silent(step: str, done: int = 0, total: int = 0) -> None:
    """A `Progress` that shows nothing."""


def tracked(progress: Progress, step: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yield `items`, reporting each one as part of `step`."""
    for done, item in enumerate(items):
        progress(step, done, total)
        yield item
    progress(step, total, total)
