"""Options shared by commands: equal names mean equal things, and contradictions are errors."""

import inspect
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import typer
from typer.main import get_command

from export.cli.clip_deploy import app

SHARED = {"ca", "cert", "key", "url", "runner"}
NOBODY = "grpc://127.0.0.1:9"  # the discard port, on which no server listens
ENCRYPTED = "grpcs://127.0.0.1:9"


def one_line(out: str, err: str) -> str:
    return " ".join((out + err).split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "expected either --url of a running server or --bundle"),
        (("--url", NOBODY, "--bundle", "bundle"), "got both"),
        (("--url", NOBODY, "--runner", "openvino:int8"), "--runner belongs to --bundle"),
        (("--url", NOBODY, "--exif-orientation"), "--exif-orientation belongs to --bundle"),
        (("--url", NOBODY, "--scale-16-bit"), "--scale-16-bit belongs to --bundle"),
        (("--bundle", "bundle", "--ca", "ca.pem"), "--ca belongs to --url"),
        (("--bundle", "bundle", "--cert", "c.pem", "--key", "k.pem"), "--cert belongs to --url"),
        (("--runner", "openvino:int8"), "got neither"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("embed", "--text", "a cat"),
        ("classify", "cat.jpg", "--label", "cat", "--label", "dog"),
        ("rank", "cat.jpg", "--text", "a cat"),
        ("search", "build", ".", "--output", "index"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_contradictory_options_are_errors(run, command, options, said):
    code, out, err = run(*command, *options)
    assert code == 2, out
    assert said in one_line(out, err)


def test_credentials_in_the_environment_do_not_contradict_a_bundle(run, tiny_bundle):
    arguments = ("embed", "--text", "a cat", "--bundle", tiny_bundle.path, "--json")
    code, out, err = run(*arguments, CLIP_CA="/nowhere/ca.pem")
    assert code == 0, err
    assert json.loads(out)["shape"] == [1, 32]


def test_credentials_in_the_environment_are_used_with_a_url(run):
    code, out, err = run("embed", "--text", "a cat", "--url", ENCRYPTED, CLIP_CA="/nowhere/ca.pem")
    assert code == 2
    assert "/nowhere/ca.pem" in one_line(out, err)


def callbacks(app: typer.Typer, path: str = "") -> Iterator[tuple[str, Callable[..., None]]]:
    """Every command of an application, with the function that it runs."""
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        yield f"{path} {name}".strip(), command.callback
    for group in app.registered_groups:
        yield from callbacks(group.typer_instance, group.name)


def options_of(command, path: str = "") -> dict[str, dict[str, object]]:
    """Every option of every command below `command`, by command."""
    if hasattr(command, "commands"):
        found = {}
        for name, below in command.commands.items():
            found |= options_of(below, f"{path} {name}".strip())
        return found
    return {
        path: {
            option: parameter
            for parameter in command.params
            for option in parameter.opts
            if option.startswith("--")
        }
    }


def test_options_of_one_name_take_the_same_type():
    """For example, an option is not a number in one command and a path in another."""
    kinds = defaultdict(lambda: defaultdict(list))
    for command, callback in callbacks(app):
        for parameter in inspect.signature(callback).parameters.values():
            annotation = inspect.get_annotations(callback, eval_str=True)[parameter.name]
            kind = get_args(annotation)[0] if get_args(annotation) else annotation
            wrapped = r"list\[([^]]+)\]| \| None|<class '(.*)'>|typing.Optional\[(.*)\]"
            single = re.sub(wrapped, r"\1\2\3", str(kind))
            kinds[parameter.name][single].append(command)
    del kinds["precision"]  # `assemble` takes any precision of the bundle
    assert {name: dict(found) for name, found in kinds.items() if len(found) > 1} == {}


def test_every_command_has_help_for_every_option():
    missing = [
        f"{command} {option}"
        for command, options in options_of(get_command(app)).items()
        for option, parameter in options.items()
        if not getattr(parameter, "help", None)
    ]
    assert missing == []


def test_connection_options_have_one_definition():
    """`connects` defines them, and no command declares its own."""
    declared = []
    for info in app.registered_commands:
        source = inspect.unwrap(info.callback)
        own = set(inspect.signature(source).parameters)
        declared += [f"{source.__name__} {name}" for name in own & SHARED]
    assert set(declared) <= {"assemble runner", "bulk runner"}
