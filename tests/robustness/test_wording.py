"""Test that no code depends on the wording of error messages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

COPIED = ("export", "serving", "model_repository", "benchmarks", "training", "tests", "assets")
PLAIN = '    return f"{reason}; {advice}" if advice else reason\n'
CAPITALS = '    return (f"{reason}; {advice}" if advice else reason).upper()\n'
BEHAVIOUR = (
    "tests/integration/test_clients.py",
    "tests/integration/test_limits.py",
    "tests/integration/test_server.py",
    "tests/integration/test_zero_shot.py",
    "tests/unit/serving/bulk",
    "tests/unit/serving/search",
    "tests/unit/serving/tasks",
)


@pytest.fixture
def reworded(tmp_path) -> Path:
    """Copy of the project whose error messages are all in capital letters."""
    for name in COPIED:
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=ignore)
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    errors = tmp_path / "serving" / "errors.py"
    source = errors.read_text()
    assert source.count(PLAIN) == 1
    errors.write_text(source.replace(PLAIN, CAPITALS))
    return tmp_path


def test_behaviour_does_not_depend_on_wording(reworded, tmp_path):
    plugins = ["-p", "tests.support.any_case", "-p", "no:cacheprovider"]
    options = ["-q", "-n", "2", "--dist", "loadfile", "-m", "not wording"]
    command = [sys.executable, "-m", "pytest", *plugins, *options, *BEHAVIOUR]
    environment = os.environ | {"PYTHONPATH": str(reworded)}
    code = "import serving.errors as e; print(e.InputError('in capitals'), e.__file__)"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=reworded,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split()[:2] == ["IN", "CAPITALS"]
    assert str(reworded) in said
    ran = subprocess.run(command, cwd=reworded, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-20_000:]
