"""Terminal output of the commands: results, notes, errors, progress and `--json`.

Nothing here interprets markup, so that user input, such as labels and file names, is printed
literally.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_command

from serving.cli.option_numbers import restrict_numbers
from serving.errors import ClipDeployError
from serving.util.files import NO_SPACE
from serving.util.progress import Progress
from serving.util.typed_json import json_text

_OUT = Console(width=None if sys.stdout.isatty() else 120)
_LOG = Console(stderr=True)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, last on standard output.")
]

Cell = str | Text
"""Cell of a table: plain text, or text with a style."""


def result(content: str | Table) -> None:
    """Print a result on standard output."""
    _print(_OUT, content)


def note(text: str, style: str = "") -> None:
    """Print a note for people on standard error."""
    _print(_LOG, text, style)


def document(value: Any) -> None:
    """Print a dataclass, or a list of dataclasses, as one JSON document on standard output."""
    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]] = ()) -> Table:
    """Return a table of plain texts.

    Args:
        title: title above the table.
        columns: names of the columns; a name that begins with `>` aligns its column to the right.
        rows: one cell per column.
    """
    # rich folds a title to the width of its table.
    width = min(cell_len(title), _OUT.width)
    made = Table(title=Text(title), show_header=any(columns), min_width=width)
    for column in columns:
        right = column.startswith(">")
        name = Text(column.removeprefix(">"))
        made.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        add(made, row)
    return made


def add(made: Table, row: Sequence[Cell]) -> None:
    """Add a row of plain texts to a table."""
    made.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))


def printable(text: str) -> str:
    """Return text that a terminal can show: file names may hold bytes that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


@contextmanager
def progress(first: str) -> Iterator[Progress]:
    """Show progress: a bar with the elapsed time on a terminal, elsewhere one line per step.

    Args:
        first: the first step.

    Yields:
        A `Progress` to report steps to.
    """
    columns = (SpinnerColumn(), TextColumn("{task.fields[step]}", markup=False), BarColumn())
    before = ""

    def show(step: str, done: int = 0, total: int = 0) -> None:
        nonlocal before
        bars.update(task, step=printable(step), completed=done, total=total or None)
        if step != before and not _LOG.is_terminal:
            note(step)
        before = step

    with Bars(*columns, TimeElapsedColumn(), console=_LOG, disable=not _LOG.is_terminal) as bars:
        task = bars.add_task("", total=None, step=printable(first))
        show(first)
        yield show


class DefaultCommandGroup(TyperGroup):
    """Group whose first command is the default, as in `python -m export CHECKPOINT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: D102
        if args and args[0] not in self.commands and args[0] != "--help":
            args.insert(0, next(iter(self.commands)))
        return super().parse_args(ctx, args)


def run(app: typer.Typer) -> None:
    """Run an application; errors of this project become a message and exit code 2."""
    command = get_command(app)
    restrict_numbers(command)
    try:
        command()
    except ClipDeployError as error:
        _fail(str(error))
    except OSError as error:  # from a file that was not written with `serving.util.files`
        if error.errno not in NO_SPACE:
            raise
        where = f" to write {error.filename}" if error.filename else ""
        _fail(f"no space is left on the disk{where}; free some space, or write elsewhere")


def _fail(message: str) -> None:
    _print(_LOG, Text.assemble(("error: ", "bold red"), printable(message)))
    sys.exit(2)


def _print(console: Console, content: str | Text | Table, style: str = "") -> None:
    """Print without interpreting markup or wrapping lines of text."""
    shown = Text(printable(content), style=style) if isinstance(content, str) else content
    console.print(shown, highlight=False, soft_wrap=not isinstance(shown, Table))
