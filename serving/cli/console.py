"""What the command lines share: how errors are printed, `--json`, a group with a default."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from typer.core import TyperGroup

from serving.errors import ClipDeployError
from serving.util.files import NO_SPACE
from serving.util.progress import Steps

out = Console(width=None if sys.stdout.isatty() else 120)
"""Results."""

log = Console(stderr=True)
"""Progress and errors."""

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, last on standard output.")
]


@contextmanager
def steps(first: str) -> Iterator[Steps]:
    """Show what is being done, how far it is and for how long; the block is given a `Steps`.

    On a terminal a bar, elsewhere a line a step.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    shown = ""

    def show(step: str, done: int = 0, total: int = 0) -> None:
        nonlocal shown
        progress.update(task, description=step, completed=done, total=total or None)
        if step != shown and not log.is_terminal:
            log.print(step, highlight=False, soft_wrap=True)
        shown = step

    with Progress(*columns, console=log, disable=not log.is_terminal) as progress:
        task = progress.add_task(first, total=None)
        show(first)
        yield show


class DefaultCommandGroup(TyperGroup):
    """A group whose first command is meant when none is named: `python -m export CHECKPOINT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: D102
        if args and args[0] not in self.commands and args[0] != "--help":
            args.insert(0, next(iter(self.commands)))
        return super().parse_args(ctx, args)


def run(app: typer.Typer) -> None:
    """Run a command line; errors of ours are one message and exit code 2, not a traceback."""
    try:
        app()
    except ClipDeployError as error:
        _tell(str(error))
    except OSError as error:  # of what is not written by `serving.util.files`, such as a picture
        if error.errno not in NO_SPACE:
            raise
        where = f" to write {error.filename}" if error.filename else ""
        _tell(f"no space is left on the disk{where}; free some, or write elsewhere")


def _tell(message: str) -> None:
    log.print("[bold red]error:[/]", escape(message), highlight=False, soft_wrap=True)
    sys.exit(2)
