"""Output of commands: literal, harmless to terminals, and from one module only."""

import ast
import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest
import typer

from serving.cli import console
from serving.cli.console import printable, styled, table
from serving.errors import ServerError
from tests.support.paths import CHECKOUT

HOSTILE = "[/b] [red]x[/red] \x1b[31m\x1b]0;title\x07\x9b2J\r\u202e\ud800\udce9"
SHOWN = r"[/b] [red]x[/red] \x1b[31m\x1b]0;title\x07\x9b2J\r\u202e\ud800\xe9"


def test_printable_escapes_only_what_controls_a_terminal():
    assert printable(HOSTILE) == SHOWN
    assert printable("a\nb\tc\u2028d") == r"a\nb\tc\u2028d"
    ordinary = "über 猫 🐈‍⬛ né e\u0301 [x] \\ '\""
    assert printable(ordinary) == ordinary


def test_every_function_prints_literally(capsys):
    with console.progress(HOSTILE) as show:
        show(HOSTILE, 1, 2)
    console.note(HOSTILE, "yellow")
    console.result(HOSTILE)
    console.result(table(HOSTILE, (">" + HOSTILE,), [(HOSTILE,)], HOSTILE))
    console.result(table("", ("x",), [(styled((HOSTILE, "red"), HOSTILE),)]))
    out, err = capsys.readouterr()
    for text in (out, err):
        text.encode()
        assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(text)
    assert err.splitlines() == [SHOWN] * 2
    assert out.splitlines()[0] == SHOWN
    folded = out.replace("│", "").replace("┃", "").replace("\n", "").replace(" ", "")
    assert folded.count(SHOWN.replace(" ", "")) == 7


def test_lines_of_a_message_cannot_look_like_another_message(capsys):
    console.note("skipped a\nerror: b")
    console.result("a\nb")
    with pytest.raises(SystemExit):
        console._fail("first\nerror: second")
    out, err = capsys.readouterr()
    assert out == "a\n    b\n"
    assert err == "skipped a\n    error: b\nerror: first\n    error: second\n"


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(
        "import sys, time, typer\nfrom typing import Annotated, Literal\n"
        "from serving.cli.console import note, progress, result, run, table\n"
        "from serving.errors import ServerError\n"
        "app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)\n"
        "@app.command()\n"
        "def command(text: str, top: Annotated[int, typer.Option(min=1, help='How many.')] = 3,\n"
        "            kind: Literal['a', 'b'] = 'a'):\n"
        '    """Do it."""\n'
        "    with progress(text) as show:\n"
        "        show(text, 1, 2)\n        time.sleep(0.3)\n"
        "    note(text, 'yellow')\n"
        "    result(table(text, (text,), [(text,)]))\n"
        "    raise ServerError(text)\n"
        "run(app)\n"
    )
    return sys.executable, str(file)


def on_terminal(command) -> tuple[int, str]:
    """Run a command on a pseudo-terminal; return its exit code and what the terminal received."""
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdin=other, stdout=other, stderr=other, env=environment
    )
    os.close(other)
    received = b""
    with suppress(OSError):  # EIO is the end of a pseudo-terminal
        while data := os.read(main, 10_000):
            received += data
    os.close(main)
    return process.wait(), received.decode()


HOSTILE_ARGUMENT = "[/b] [red]x[/red] \x1b[35m\x1b]0;title\x07"
SHOWN_ARGUMENT = r"[/b] [red]x[/red] \x1b[35m\x1b]0;title\x07"


def test_terminal_receives_no_escapes_of_the_user(program):
    command = ["env", f"PYTHONPATH={CHECKOUT}", *program, HOSTILE_ARGUMENT]
    code, received = on_terminal(command)
    assert code == 2, received
    assert "Traceback" not in received
    assert received.count(SHOWN_ARGUMENT) >= 5  # progress, note, title, column, cell, error
    assert "\x1b[35m" not in received
    assert "\x1b]" not in received
    assert "\x07" not in received
    assert "\x1b[" in received  # colors of our own


@pytest.mark.parametrize(
    "arguments",
    [
        ("x", "--kind", HOSTILE_ARGUMENT),
        ("x", "--top", "0", "--" + HOSTILE_ARGUMENT),
        ("x", HOSTILE_ARGUMENT),
        ("x", "--top=1", "--kind=[/b]\x1b[35m"),
    ],
)
def test_usage_errors_show_values_literally(program, arguments):
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "[/b]" in done.stderr
    assert r"\x1b[35m" in done.stderr
    assert "\x1b" not in done.stderr
    assert "Usage: " in done.stderr


def test_help_is_shown(program):
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "How many." in done.stdout
    serving = [sys.executable, "-m", "serving"]
    done = subprocess.run(serving, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 2
    assert "classify" in done.stdout + done.stderr


def test_ascii_terminals_get_escapes(program):
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*program, "über 猫"], capture_output=True, env=environment)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert rb"error: \xfcber \u732b" in done.stderr


ALLOWED = {
    "serving/cli/console.py",
    # Protocols between processes of this project:
    "serving/triton/supervisor.py",
    "export/doctor/installed.py",
    "benchmarks/latency/footprint.py",
}
PRINTERS = {"print", "Console", "echo", "secho", "pprint", "print_exc", "Text", "Panel"}


def test_no_other_module_prints():
    found = []
    for package in ("serving", "export", "benchmarks", "training"):
        for path in sorted((CHECKOUT / package).rglob("*.py")):
            name = path.relative_to(CHECKOUT).as_posix()
            if name in ALLOWED:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                    on = ast.unparse(node.func)
                    if called in PRINTERS or on.startswith(("sys.stdout", "sys.stderr")):
                        found.append(f"{name}:{node.lineno} {on}")
                if isinstance(node, ast.Import | ast.ImportFrom):
                    modules = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                    if any(module.split(".")[0] == "rich" for module in modules):
                        found.append(f"{name}:{node.lineno} imports rich")
    assert found == []


def test_errors_of_servers_are_escaped(capsys, monkeypatch):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command():
        raise ServerError(f"the server says {HOSTILE}", advice=HOSTILE)

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit):
        console.run(app)
    err = capsys.readouterr().err
    assert err.count(SHOWN) == 2
