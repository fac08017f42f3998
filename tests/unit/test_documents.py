"""The documents: commands and options exist, links resolve, and examples run.

`<!-- not run: reason -->` above a shell block excludes the block from the run. Historical records
(CHANGELOG.md, docs/decisions/) may name commands and options that were removed.
"""

import ast
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer.main
from PIL import Image

import benchmarks.__main__
import export.__main__
import serving.__main__
import training.__main__
from export.cli import clip_deploy
from serving.cli.console import DefaultCommandGroup

CHECKOUT = Path(__file__).parents[2]
RECORDS = CHECKOUT / "docs" / "decisions"
DOCUMENTS = [
    *(CHECKOUT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")),
    CHECKOUT / "model_repository" / "README.md",
    *sorted((CHECKOUT / "docs").rglob("*.md")),
]
CURRENT = [path for path in DOCUMENTS if RECORDS not in path.parents]
RUN = [CHECKOUT / "README.md", CHECKOUT / "docs" / "quickstart.md"]
README_LINES = 180

PROGRAMS = {
    "clip-deploy": clip_deploy.app,
    "python -m serving": serving.__main__.app,
    "python -m export": export.__main__.app,
    "python -m benchmarks": benchmarks.__main__.app,
    "python -m training": training.__main__.app,
}
FOREIGN_OPTIONS = {"--http-max-input-size", "--model-control-mode"}
"""Options of tritonserver that documents name in inline code."""
FOREIGN_PROGRAMS = {"pip"}
SHELL = {"sh", "console"}
NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    text: str
    line: int
    comment: str
    """The line above the block."""

    @property
    def runs(self) -> bool:
        return NOT_RUN.fullmatch(self.comment) is None


def name_of(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
each_current_document = pytest.mark.parametrize("document", CURRENT, ids=name_of)


def divided(text: str) -> tuple[list[Block], str]:
    """Return the fenced blocks of a document, and its text without them."""
    blocks, prose, inside, start = [], [], None, 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        fence = re.match(r"\s*```(\w*)", line)
        if inside is None and fence:
            inside, start, language = [], number, fence[1]
        elif inside is None:
            prose.append(line)
        elif fence:
            above = lines[start - 2].strip() if start > 1 else ""
            blocks.append(Block(language, "\n".join(inside), start, above))
            inside = None
        else:
            inside.append(line)
    assert inside is None, f"the block at line {start} has no end"
    return blocks, "\n".join(prose)


def commands_of(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a shell block, each with the output that the block shows for it."""
    if block.language != "console":
        return [(block.text, "")]
    commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not commands[0].strip(), f"line {block.line}: expected `$ ` before the first command"
    return [(command, output) for command, _, output in (c.partition("\n") for c in commands[1:])]


def arguments_of(script: str) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell script, without variables before it."""
    script = re.sub(r"\\\n\s*", " ", script)
    script = re.sub(r"<<'(\w+)'\n.*?^\1$", "", script, flags=re.MULTILINE | re.DOTALL)
    for line in script.splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                yield words
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):
                words.append(word)


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the program of PROGRAMS that a command calls, and its arguments."""
    if not words:
        return None
    first = re.sub(r"^python3?(\.\d+)?$", "python", Path(words[0]).name)
    for name in PROGRAMS:
        count = len(name.split())
        if " ".join([first, *words[1:count]]) == name:
            return name, words[count:]
    return None


@functools.cache
def command_of(program: str) -> Any:
    return typer.main.get_command(PROGRAMS[program])


def is_group(command: Any) -> bool:
    return hasattr(command, "commands")


def options_of(command: Any) -> dict[str, Any]:
    found = {
        name: parameter
        for parameter in command.params
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    return found | {"--help": None}


def choices_of(annotation: Any) -> list[str]:
    """Return the values that the type of an option lists, or nothing for other types."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for nested in get_args(annotation) for value in choices_of(nested)]


def faults_of(program: str, words: list[str]) -> list[str]:
    """Return the commands and options in the arguments that the program does not have."""
    command, path, left, faults = command_of(program), program, list(words), []
    while left:
        word = left.pop(0)
        name, has_value, value = word.partition("=")
        if word.startswith("--"):
            if name not in options_of(command):
                faults.append(f"{path} has no option {name}")
                continue
            option = options_of(command)[name]
            if option is None or option.is_flag:
                continue
            value = value if has_value else left.pop(0) if left else ""
            choices = choices_of(option.type_descriptor.annotation)
            if choices and value and value not in choices:
                faults.append(f"{path} {name} is none of {', '.join(choices)}: {value}")
        elif is_group(command):
            if re.fullmatch(r"[A-Z]+|…", word):  # a placeholder
                return faults
            if word in command.commands:
                command, path = command.commands[word], f"{path} {word}"
            elif isinstance(command, DefaultCommandGroup):
                command = next(iter(command.commands.values()))
            else:
                return [*faults, f"{path} has no command {word}"]
    return faults


def every_option(command: Any) -> Iterator[str]:
    yield from options_of(command)
    for nested in getattr(command, "commands", {}).values():
        yield from every_option(nested)


@functools.cache
def all_options() -> frozenset[str]:
    return frozenset(name for program in PROGRAMS for name in every_option(command_of(program)))


def script_faults(script: str) -> list[str]:
    faults = []
    for words in arguments_of(script):
        if called := program_of(words):
            faults += faults_of(*called)
        elif words[:1] == ["make"]:
            targets = re.findall(r"^([\w-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
            named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            faults += [f"make has no target {name}" for name in named if name not in targets]
    return faults


def code_faults(code: str) -> list[str]:
    """Return the faults of inline code: a command line, the end of one, or a single option."""
    if "--" not in code and not code.startswith(("clip-deploy ", "python -m ", "make ", "search ")):
        return []
    words = next(arguments_of(code.replace("'", "")), [])
    if program_of(words) or words[:1] == ["make"]:
        return script_faults(code)
    if words and Path(words[0]).name in FOREIGN_PROGRAMS:
        return []
    homes = [name for name in PROGRAMS if words and words[0] in command_of(name).commands]
    if homes:
        return min((faults_of(home, words) for home in homes), key=len)
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    known = all_options() | FOREIGN_OPTIONS
    return [f"no command has an option {name}" for name in names if name not in known]


def shell_lines(prose: str) -> Iterator[str]:
    """Yield the lines of indented blocks that call one of our programs."""
    for line in re.findall(r"^    (.*)$", prose, re.MULTILINE):
        if re.match(r"(\S*/)?(clip-deploy|python3? -m|make) ", line):
            yield line


def test_document_is_split_into_blocks_and_prose():
    text = (
        "a `b --c`\n\n<!-- not run: why -->\n```sh\nX=1 clip-deploy up --port 1 | cat  # d\n```\n"
    )
    blocks, prose = divided(text)
    assert [(b.language, b.comment, b.runs) for b in blocks] == [
        ("sh", "<!-- not run: why -->", False)
    ]
    assert prose == "a `b --c`\n\n<!-- not run: why -->"
    assert list(arguments_of(blocks[0].text)) == [["clip-deploy", "up", "--port", "1"], ["cat"]]
    assert script_faults(blocks[0].text) == ["clip-deploy up has no option --port"]
    console = Block("console", "$ a b\nout\n$ c\n", 1, "")
    assert commands_of(console) == [("a b", "out\n"), ("c", "")]


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("clip-deploy ship it", ["clip-deploy has no command ship"]),
        ("clip-deploy up --nohost 1", ["clip-deploy up has no option --nohost"]),
        ("clip-deploy search forget X", ["clip-deploy search has no command forget"]),
        ("search forget", ["clip-deploy search has no command forget"]),
        ("up --nohost", ["clip-deploy up has no option --nohost"]),
        ("--nohost", ["no command has an option --nohost"]),
        ("make nothing", ["make has no target nothing"]),
        (".venv/bin/python -m export random:ViT-B-32 --precision int8", []),
        ("clip-deploy COMMAND --help", []),
        ("latency --full", []),
        ("assemble --backend python", []),
    ],
)
def test_faults_of_command_lines_are_found(code, faults):
    assert code_faults(code) == faults


def test_invalid_choice_is_found():
    (fault,) = code_faults("clip-deploy assemble B --backend openvino")
    assert "--backend is none of" in fault


@each_current_document
def test_commands_and_options_exist(document):
    blocks, prose = divided(document.read_text())
    faults = []
    for block in blocks:
        if block.language in SHELL:
            for command, _ in commands_of(block):
                faults += [f"line {block.line}: {fault}" for fault in script_faults(command)]
    for line in shell_lines(prose):
        faults += script_faults(line)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        code = " ".join(code.split())
        faults += [f"`{code}`: {fault}" for fault in code_faults(code)]
    assert not faults, "\n".join(faults)


def anchors_of(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ +(.+)$", divided(text)[1], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@each_document
def test_relative_links_resolve(document):
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", divided(document.read_text())[1]):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists():
            faults.append(f"{target}: no such file")
        elif anchor and anchor not in anchors_of(path.read_text()):
            faults.append(f"{target}: {path.name} has no such heading")
    assert not faults, "\n".join(faults)


def test_readme_is_short():
    assert len((CHECKOUT / "README.md").read_text().splitlines()) <= README_LINES


def imported(node: ast.Import | ast.ImportFrom) -> None:
    """Import what a statement of a document imports."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            importlib.import_module(alias.name)
        else:
            getattr(importlib.import_module(node.module), alias.name)


@each_document
def test_python_blocks_import(document):
    for block in divided(document.read_text())[0]:
        if block.language != "python":
            continue
        imports = [
            node
            for node in ast.walk(ast.parse(block.text))
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        for node in imports:
            try:
                imported(node)
            except (ImportError, AttributeError) as error:
                pytest.fail(f"line {block.line}: {ast.unparse(node)}: {error}")


@each_current_document
def test_excluded_block_gives_a_reason(document):
    text = document.read_text()
    reasons = [b.comment for b in divided(text)[0] if b.language in SHELL and not b.runs]
    comments = [line.strip() for line in text.splitlines() if line.startswith("<!-- not run")]
    assert comments == reasons, "expected `<!-- not run: reason -->` right above a shell block"


@pytest.mark.parametrize("document", RUN, ids=name_of)
def test_every_block_of_a_run_document_has_a_language(document):
    blocks, prose = divided(document.read_text())
    assert [b.line for b in blocks if b.language not in SHELL | {"python", "text"}] == []
    assert list(shell_lines(prose)) == [], "expected a fenced block"


class Reader:
    """Follow a document: run its blocks in order, in a directory with the files that they name.

    The server of `clip-deploy up` runs in the background on free ports until the end. These ports
    replace the ports that the document names.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server: subprocess.Popen[str] | None = None
        self.addresses: dict[str, str] = {}
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "CURL_HOME": str(directory),
        }

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            try:
                self.server.communicate(timeout=40)
            finally:
                self.server.kill()

    def follow(self, block: Block) -> None:
        for script, output in commands_of(block):
            before, up, after = self._around_up(script)
            self._run(before, block, "" if up else output)
            if up:
                self._start(up)
                self._run(after, block, output)

    @staticmethod
    def _around_up(script: str) -> tuple[str, str, str]:
        found = re.search(r"^clip-deploy up\b.*$", script, re.MULTILINE)
        if found is None:
            return script, "", ""
        return script[: found.start()], found[0], script[found.end() :]

    def _start(self, command: str) -> None:
        assert self.server is None, "expected one server per document"
        words = shlex.split(command, comments=True)
        words += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--json"]
        self.server = subprocess.Popen(
            words,
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, f"{command}: ended with {self.server.wait()}"
        started = json.loads(line)
        for protocol, port in (("http", 8000), ("grpc", 8001)):
            self.addresses[f"localhost:{port}"] = started[protocol].partition("://")[2]

    def _run(self, script: str, block: Block, output: str) -> None:
        for documented, actual in self.addresses.items():
            script = script.replace(documented, actual)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"line {block.line}: {script}\n{done.stdout}{done.stderr}"
        # Values depend on the checkpoint, but titles and column names do not.
        words = re.findall(r"[a-z]{3,}", "\n".join(output.splitlines()[:2]))
        missing = [word for word in words if word not in done.stdout + done.stderr]
        assert not missing, f"line {block.line}: {script}\nprinted no {missing}:\n{done.stdout}"


@pytest.fixture
def reader(tmp_path, tiny_checkpoint, tiny_bundle, pictures):
    """A `Reader` in a directory with tiny versions of the files that the documents name."""
    (tmp_path / ".curlrc").write_text("fail\n")  # makes curl fail on HTTP errors
    shutil.copytree(tiny_checkpoint, tmp_path / "my-clip")
    shutil.copytree(tiny_bundle.path, tmp_path / "artifacts" / "shapes-clip")
    shutil.copytree(pictures, tmp_path / "photos")
    (tmp_path / "captions.txt").write_text("a cat\na dog on grass\na red car\n")
    Image.open(pictures / "wide.jpg").save(tmp_path / "cat.jpg")
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    for name, label in (("wide.jpg", "a cat"), ("tall.jpg", "a dog")):
        shutil.copy(pictures / name, labelled)
        with (labelled / "captions.txt").open("a") as file:
            file.write(f"{name}, {label}\n")
    demo = tmp_path / "build" / "demo" / "pictures"
    demo.mkdir(parents=True)
    for name in ("0000.jpg", "0001.jpg", "0002.jpg", "0003.png", "0004.jpg", "0173.jpg"):
        Image.open(pictures / "small.png").save(demo / name)
    (demo / "labels.txt").write_text("a white star\na red circle\na blue arrow\n")
    with Reader(tmp_path) as reader:
        yield reader


@pytest.mark.parametrize("document", RUN, ids=name_of)
def test_the_blocks_of_a_document_run(document, reader):
    blocks = [b for b in divided(document.read_text())[0] if b.language in SHELL and b.runs]
    assert blocks
    if shutil.which("curl") is None and any("curl " in block.text for block in blocks):
        pytest.skip(f"{name_of(document)} calls curl, which is not installed")
    for block in blocks:
        reader.follow(block)
