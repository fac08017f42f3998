"""What the command lines share: how errors are printed, `--json`, a group with a default."""

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from serving.errors import ClipDeployError

out = Console(width=None if sys.stdout.isatty() else 120)
"""Results."""

log = Console(stderr=True)
"""Progress and errors."""

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, last on standard output.")
]


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
        log.print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)
