"""Targets that are checked before the work, and files that are replaced atomically."""

import ast
import io
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serving.errors import InputError, StorageError
from serving.util.files import (
    check_directory,
    check_file,
    check_replaceable,
    new_directory,
    new_file,
    write_bytes,
)
from tests.support.devices import device
from tests.support.paths import CHECKOUT
from tests.support.permissions import as_user

LONGEST = 255


def test_missing_directories_are_created_only_when_the_file_is_written(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    check_file(path)
    assert list(tmp_path.iterdir()) == []
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [item.name for item in path.parent.iterdir()] == ["file"]


def targets(root):
    (root / "plain").write_text("a file")
    (root / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "socket"))
    return {
        "directory": root,
        "below a file": root / "plain" / "file",
        "loop": root / "loop",
        "socket": root / "socket",
        "name too long": root / ("n" * (LONGEST + 1)),
        "directory too long": root / ("n" * (LONGEST + 1)) / "file",
        "read-only file system": "/proc/file",
        "standard output": "-",
    }


@pytest.mark.parametrize(
    "which",
    [
        *("directory", "below a file", "loop", "socket", "name too long", "directory too long"),
        *("read-only file system", "standard output"),
    ],
)
def test_unusable_file_targets_are_rejected_before_and_during_the_write(tmp_path, which):
    path = Path(targets(tmp_path)[which])
    before = sorted(tmp_path.iterdir())
    for attempt in (check_file, lambda path: write_bytes(path, b"x")):
        with pytest.raises(InputError):
            attempt(path)
    assert sorted(tmp_path.iterdir()) == before


def test_read_only_targets_are_rejected(tmp_path):
    locked, file = tmp_path / "locked", tmp_path / "file"
    locked.mkdir(mode=0o555)
    file.touch(mode=0o444)
    code = (
        "import sys\nfrom pathlib import Path\nfrom serving.errors import InputError\n"
        "from serving.util.files import check_directory, check_file, check_replaceable\n"
        "locked, file = map(Path, sys.argv[1:])\n"
        "for check, path in ((check_file, locked / 'x'), (check_file, file),\n"
        "    (check_directory, locked), (check_directory, locked / 'x' / 'y'),\n"
        "    (lambda path: check_replaceable(path, 'sign'), locked / 'x')):\n"
        "    try:\n        check(path)\n    except InputError:\n        print('rejected')\n"
    )
    command = [*as_user(), sys.executable, "-c", code, locked, file]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout.split() == ["rejected"] * 5, done.stderr


def test_devices_and_pipes_are_written_and_not_replaced(tmp_path):
    null = device("null", tmp_path)
    before = null.stat()
    check_file(null)
    write_bytes(null, b"x")
    assert stat.S_ISCHR(null.stat().st_mode)
    assert null.stat().st_ino == before.st_ino
    with pytest.raises(StorageError):
        write_bytes(device("full", tmp_path), b"x")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_file(pipe)  # without a reader, opening it would block
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"through the pipe")
    reader.join(10)
    assert received == [b"through the pipe"]
    assert pipe.is_fifo()


def test_open_files_are_written_and_not_replaced(tmp_path):
    """`--output /dev/fd/1 >> file` appends to the file."""
    file = tmp_path / "file"
    file.write_bytes(b"old ")
    with file.open("ab") as out:
        code = "import pathlib, serving.util.files as f; f.write_bytes(pathlib.Path({!r}), b'new ')"
        command = [sys.executable, "-c", code.format("/dev/fd/1")]
        subprocess.run(command, cwd=CHECKOUT, stdout=out, check=True)
    assert file.stat().st_nlink == 1
    assert file.read_bytes().endswith(b"new ")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    (tmp_path / "dangling").symlink_to(tmp_path / "later" / "file")
    write_bytes(tmp_path / "dangling", b"new")
    assert (tmp_path / "later" / "file").read_bytes() == b"new"
    (tmp_path / "directory").symlink_to("elsewhere")
    (tmp_path / "elsewhere" / "sign").touch()
    with new_directory(tmp_path / "directory", "sign") as new:
        (new / "sign").write_text("new")
    assert (tmp_path / "directory").is_symlink()
    assert (tmp_path / "elsewhere" / "sign").read_text() == "new"


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path):
    for name in ("n" * LONGEST, "ü" * (LONGEST // 2)):
        file, directory = tmp_path / "files" / name, tmp_path / "directories" / name
        check_file(file)
        write_bytes(file, b"new")
        assert file.read_bytes() == b"new"
        for content in ("first", "second"):
            check_replaceable(directory, "sign")
            with new_directory(directory, "sign") as new:
                (new / "sign").write_text(content)
        assert (directory / "sign").read_text() == "second"
    assert len(list((tmp_path / "files").iterdir())) == 2
    assert len(list((tmp_path / "directories").iterdir())) == 2


def test_unusable_directories_are_rejected(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file", "file/below", "n" * (LONGEST + 1), "x/" + "n" * (LONGEST + 1)):
        with pytest.raises(InputError):
            check_directory(tmp_path / path)
        with pytest.raises(InputError):
            check_replaceable(tmp_path / path, "sign")
    for path in (device("null", tmp_path), "/proc/new", "-"):
        with pytest.raises(InputError):
            check_directory(Path(path))
    with pytest.raises(InputError):
        check_replaceable(Path("/proc"), "sign")
    assert {item.name for item in tmp_path.iterdir()} <= {"file", "null"}


def test_failure_in_the_block_keeps_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with pytest.raises(KeyError), new_file(file) as out:  # noqa: PT012
        out.write(b"half")
        raise KeyError
    assert file.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_writers_of_one_file_take_turns(tmp_path):
    """The file always has the content of one of them, and no temporary file is left."""
    file, data = tmp_path / "file", [bytes([number]) * 200_000 for number in range(6)]

    def write(content):
        for _ in range(5):
            with new_file(file) as out:
                for start in range(0, len(content), 50_000):
                    out.write(content[start : start + 50_000])

    writers = [threading.Thread(target=write, args=(content,)) for content in data]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert file.read_bytes() in data
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_leftover_of_a_killed_write_is_replaced(tmp_path):
    (tmp_path / ".file.tmp").write_bytes(b"half of something longer")
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_file_can_be_written_by_libraries(tmp_path):
    """They seek in it, as in any file."""
    with new_file(tmp_path / "file") as out:
        out.write(b"0123456789")
        out.seek(2)
        out.write(b"xx")
        assert isinstance(out, io.BufferedRandom)
    assert (tmp_path / "file").read_bytes() == b"01xx456789"


IN_NEW_DIRECTORIES = {
    # Files of directories that are created under a temporary name, or deleted after use.
    "serving/triton/repository.py",
    "benchmarks/load/measure.py",
    "benchmarks/load/perf_analyzer.py",
    # Generations of an index, which its manifest publishes.
    "serving/search/storage.py",
    # Record of attempts, which is appended to.
    "serving/bulk/isolation.py",
    # Standard error of Ray, to /dev/null.
    "serving/bulk/ray_pool.py",
    # Log of Triton, which is appended to.
    "serving/triton/server.py",
    # Pipe between processes.
    "export/doctor/installed.py",
}


def test_no_other_module_writes_files():
    found = []
    for package in ("serving", "export", "benchmarks", "training"):
        for path in sorted((CHECKOUT / package).rglob("*.py")):
            name = path.relative_to(CHECKOUT).as_posix()
            if name in {*IN_NEW_DIRECTORIES, "serving/util/files.py"}:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                method = called.rpartition(".")[2] if "." in called else ""
                opens = called == "open" or method in {"open", "fdopen"}
                modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
                writes = opens and any(
                    isinstance(mode, str) and len(mode) < 4 and set(mode) & set("wax+")
                    for mode in modes
                )
                if writes or method in {"write_text", "write_bytes", "rename", "savetxt", "tofile"}:
                    found.append(f"{name}:{node.lineno} {called}")
    assert found == []
