"""Serve a bundle with Triton, and use the service or the bundle from the command line."""

import typer

from serving.cli.app import add_commands
from serving.cli.console import run

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
add_commands(app)

if __name__ == "__main__":
    run(app)
