"""Program `clip-deploy`: the commands of `export` and `serving`.

Each command imports its dependencies when it runs, so that `clip-deploy classify` works without
torch.
"""

import typer

import export.cli.commands
import serving.cli.app
from serving.cli.console import run

app = typer.Typer(
    help="Export a CLIP checkpoint, serve it with Triton, and send requests to it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
export.cli.commands.add_commands(app, bundle_name="export")
serving.cli.app.add_commands(app)


def main() -> None:
    """Run the program with the arguments of this process."""
    run(app)
