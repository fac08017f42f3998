"""Export a CLIP checkpoint to a bundle of verified graphs."""

import typer

from export.cli.commands import add_commands
from serving.cli.console import DefaultCommandGroup, run

app = typer.Typer(
    help=__doc__,
    cls=DefaultCommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="`python -m export CHECKPOINT` is the same as `python -m export bundle CHECKPOINT`.",
)
add_commands(app, bundle_name="bundle")

if __name__ == "__main__":
    run(app)
