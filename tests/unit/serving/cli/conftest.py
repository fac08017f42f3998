"""Fixture that runs `clip-deploy` in this process."""

import sys

import pytest

from export.cli.clip_deploy import app
from serving.cli import console


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments, **environment)`: return exit code, standard output and standard error."""

    def ran(*arguments: object, **environment: str) -> tuple[int, str, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["clip-deploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            console.run(app)
        return ended.value.code or 0, *capsys.readouterr()

    return ran
