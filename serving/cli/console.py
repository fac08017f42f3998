"""Terminal output of the commands: results, notes, errors, progress and `--json`.

All output passes through this module; a test checks that no other module prints. User input, such
as labels, file names and messages of servers, is printed literally: markup is not interpreted, and
`printable` escapes what could control the terminal.
"""

import io
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table as Table
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_command

from serving.cli.option_numbers import restrict_numbers
from serving.errors import ClipDeployError, InputError
from serving.util.directories import Skipped, described
from serving.util.files import NO_SPACE
from serving.util.progress import Progress
from serving.util.typed_json import json_text

_OUT = Console(width=None if sys.stdout.isatty() else 120)
_LOG = Console(stderr=True)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, last on standard output.")
]

Cell = str | Text
"""Cell of a table: plain text, or the result of `styled`."""

_ESCAPED_KINDS = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, surrogates, and separators of lines and paragraphs."""
_BIDIRECTIONAL = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
"""Characters that change the direction of text, and so its apparent order."""
_SHOWN_SKIPPED = 10

# The usage errors of typer, which has its own copy of click since 0.26.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


def result(content: str | Table) -> None:
    """Print a result on standard output."""
    _print(_OUT, content)


def note(text: str, style: str = "") -> None:
    """Print a note for people on standard error."""
    _print(_LOG, text, style)


def note_skipped(skipped: Sequence[Skipped], ignored: Mapping[str, int], more: str = "") -> None:
    """Print notes about files that were left out.

    Args:
        skipped: files that cannot be used; the first few are listed.
        ignored: see `serving.util.directories.Found`.
        more: place of the whole list.
    """
    for item in skipped[:_SHOWN_SKIPPED]:
        note(f"skipped {printable(item.path)}: {item.reason}")
    if len(skipped) > _SHOWN_SKIPPED:
        note(f"and {len(skipped) - _SHOWN_SKIPPED} more; {more or '--json'} lists them all")
    if ignored:
        note(f"ignored {described(ignored)}")


def document(value: Any) -> None:
    """Print a dataclass, or a list of dataclasses, as one JSON document on standard output."""
    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


def binary(data: bytes) -> None:
    """Write binary data to standard output.

    Raises:
        InputError: standard output is a terminal.
    """
    if sys.stdout.isatty():
        raise InputError(
            "binary data would be written to a terminal", advice="redirect standard output"
        )
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]] = (), caption: str = ""
) -> Table:
    """Return a table of plain texts.

    Args:
        title: title above the table.
        columns: names of the columns; a name that begins with `>` aligns its column to the right.
        rows: one cell per column.
        caption: text below the table.
    """
    # rich folds a title to the width of its table.
    heading = Text(printable(title))
    width = min(cell_len(heading.plain), _OUT.width)
    made = Table(title=heading, show_header=any(columns), min_width=width)
    if caption:
        made.caption, made.caption_justify = Text(printable(caption)), "left"
    for column in columns:
        right = column.startswith(">")
        name = Text(printable(column.removeprefix(">")))
        made.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        add(made, row)
    return made


def add(made: Table, row: Sequence[Cell]) -> None:
    """Add a row of plain or styled texts to a table."""
    made.add_row(*(_text(cell) if isinstance(cell, str) else cell for cell in row))


def styled(*parts: str | tuple[str, str]) -> Text:
    """Return a cell of plain texts, and of pairs of a text and its style."""
    made = Text()
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        made.append_text(_text(text, style))
    return made


def printable(text: str) -> str:
    """Return text without characters that control a terminal; these become escapes such as `\\x1b`.

    That includes line breaks, surrogates (bytes of a file name that are not UTF-8 become `\\xe9`),
    and characters that change the direction of text.
    """
    return "".join(map(_printable, text)) if not text.isascii() or not text.isprintable() else text


def _printable(character: str) -> str:
    code = ord(character)
    if character not in _BIDIRECTIONAL and unicodedata.category(character) not in _ESCAPED_KINDS:
        return character
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, see os.fsdecode
        return f"\\x{code - 0xDC00:02x}"
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return named.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def _text(text: str, style: str = "", indent: str = "") -> Text:
    """Return text for output, which may have several lines."""
    return Text(f"\n{indent}".join(map(printable, text.split("\n"))), style=style)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the encoding may not be UTF-8
    command = get_command(app)
    restrict_numbers(command)
    try:
        sys.exit(command.main(standalone_mode=False))
    except typer.Abort:
        _fail("interrupted", code=1)
    except _ClickException as error:
        _fail_usage(error)
    except ClipDeployError as error:
        _fail(str(error))
    except OSError as error:  # from a file that was not written with `serving.util.files`
        if error.errno not in NO_SPACE:
            raise
        where = f" to write {error.filename}" if error.filename else ""
        _fail(f"no space is left on the disk{where}; free some space, or write elsewhere")


def _fail_usage(error: Any) -> None:
    """Print an error of the command line, whose message may contain values of options."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    context = getattr(error, "ctx", None)
    if context is not None:
        note(context.get_usage())
        note(f"Try '{context.command_path} --help' for help.")
    _fail(error.format_message(), code=error.exit_code)


def _fail(message: str, code: int = 2) -> None:
    shown = Text("error: ", "bold red")
    shown.append_text(_text(message, indent=_CONTINUED))
    _print(_LOG, shown)
    sys.exit(code)


_CONTINUED = "    "
"""Indentation of further lines of a message, so that no part of it looks like another message."""


def _print(console: Console, content: str | Text | Table, style: str = "") -> None:
    """Print without interpreting markup or wrapping lines of text."""
    shown = _text(content, style, _CONTINUED) if isinstance(content, str) else content
    console.print(shown, highlight=False, soft_wrap=not isinstance(shown, Table))
