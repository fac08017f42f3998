"""How long work tells what it is doing; `serving.cli.console` shows it on a terminal."""

from typing import Protocol


class Steps(Protocol):
    """Told what is being done, and, where that is known, how much of it is done."""

    def __call__(self, step: str, done: int = 0, total: int = 0) -> None:
        """Show `step`."""


def silent(step: str, done: int = 0, total: int = 0) -> None:
    """A `Steps` that shows nothing."""
