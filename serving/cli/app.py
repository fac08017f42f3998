"""Typer application with the commands of `python -m serving`."""

import typer

from serving.cli.assemble import assemble
from serving.cli.bulk import bulk
from serving.cli.classify import classify
from serving.cli.demo import demo
from serving.cli.embed import embed
from serving.cli.rank import answer, caption, rank
from serving.cli.search import app as search
from serving.cli.status import status
from serving.cli.up import up


def add_commands(app: typer.Typer) -> None:
    """Add every command of this package to `app`."""
    for command in (
        *(assemble, up, status),
        *(embed, classify, rank, answer, caption, bulk, demo),
    ):
        app.command()(command)
    app.add_typer(search, name="search")
