"""Tests that the old output stays complete when a write is killed or the disk is full.

tests/unit/serving/search/test_build.py covers killed builds of a search index.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import typer
from PIL import Image

from serving.cli.console import run as run_command
from serving.clients.local import LocalClip
from serving.errors import StorageError
from serving.search.build import build
from serving.util import files
from serving.util.files import new_directory, write_text
from tests.support.paths import CHECKOUT

SOAK = bool(os.environ.get("CLIP_SOAK"))
ASSEMBLY_KILLS = 120 if SOAK else 20
EXPORT_KILLS = 30 if SOAK else 2


def script(name, *arguments, wrapper=()):
    command = [*wrapper, sys.executable, "-m", f"tests.support.{name}", *map(str, arguments)]
    # One thread per library, because the script forks.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=os.environ | threads | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------ killed writes


def test_killed_assembly_leaves_a_complete_repository(fp32_bundle, tmp_path, figure):
    told = script("killed_writes", "assemble", fp32_bundle.path, tmp_path, ASSEMBLY_KILLS)
    assert told["kills"] >= ASSEMBLY_KILLS / 2, told  # some runs are quicker than their kill
    assert told["littered"] > 0 < told["changed"], told  # killed during and after the work
    figure(
        "killed assembly",
        f"after each of {told['kills']} kills the repository was whole; the next run left nothing "
        "behind",
    )


def test_killed_export_leaves_a_complete_bundle(tiny_checkpoint, fp32_bundle, tmp_path, figure):
    paths = tiny_checkpoint, fp32_bundle.path, tmp_path
    told = script("killed_writes", "export", *paths, EXPORT_KILLS)
    assert told["kills"] >= EXPORT_KILLS / 2, told  # some runs are quicker than their kill
    assert told["littered"] > 0, told
    figure(
        "killed export",
        f"after each of {told['kills']} kills the bundle was whole; the next run left nothing "
        "behind",
    )


REPLACE = """
import os, signal, sys
from pathlib import Path
from serving.util import files

target, point, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
if not exchange:
    files._exchange = lambda one, other: False  # as on a file system that cannot
steps = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")

def hook(event, arguments):
    global point
    if event in steps and str(target.parent) in str(arguments[0]):
        point -= 1
        if point == 0:
            os.kill(os.getpid(), signal.SIGKILL)

with files.new_directory(target, "sign") as new:
    sys.addaudithook(hook)
    (new / "sign").write_text("new")
    (new / "other").write_text("new")
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_replacing_a_directory_survives_a_kill_at_every_step(tmp_path, way):
    target, seen, missing = tmp_path / "target", set(), 0
    for point in range(1, 100):
        target.mkdir(exist_ok=True)
        for name in ("sign", "other"):
            (target / name).write_text("old")
        done = subprocess.run(
            [sys.executable, "-c", REPLACE, str(target), str(point), way], cwd=CHECKOUT, check=False
        )
        missing += not target.exists()
        if target.exists():
            (content,) = {file.read_text() for file in target.iterdir()}
            seen.add(content)
        with pytest.raises(KeyError), new_directory(target, "sign"):  # only removes leftovers
            raise KeyError
        assert {path.name for path in tmp_path.iterdir()} == {"target"}
        assert len({file.read_text() for file in target.iterdir()}) == 1
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert seen == {"old", "new"}
    assert missing == (0 if way == "exchange" else 1)


def test_temporary_directory_in_use_is_not_removed(tmp_path):
    """Directories whose names only look temporary are kept too."""
    target = tmp_path / "target"
    (tmp_path / ".target.abcdefgh" / "mine").mkdir(parents=True)
    with new_directory(target, "sign") as slow:
        (slow / "sign").write_text("slow")
        with new_directory(target, "sign") as quick:
            (quick / "sign").write_text("quick")
        assert (target / "sign").read_text() == "quick"
        assert (slow / "sign").exists()
    assert (target / "sign").read_text() == "slow"
    assert {path.name for path in tmp_path.iterdir()} == {"target", ".target.abcdefgh"}


# ------------------------------------------------------------------ full disk


@pytest.fixture(scope="module")
def namespace():
    """Command prefix for a mount namespace, where a test can mount its own small disk."""
    for options in (["--mount"], ["--mount", "--map-root-user"]):
        command = ["unshare", *options]
        with tempfile.TemporaryDirectory() as disk:
            mount = [*command, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
            try:
                done = subprocess.run(mount, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("no full disk to be had: there is no program unshare")
            if done.returncode == 0:
                return command
    pytest.skip(f"no full disk to be had: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    return path


def test_assembly_on_a_full_disk_keeps_the_old_repository(namespace, disk, fp32_bundle, figure):
    told = script("full_disk", "assemble", disk, fp32_bundle.path, wrapper=namespace)
    assert told["refused"] > 10
    figure(
        "full disk, assembly",
        f"at {told['refused']} numbers of free bytes the old repository stayed whole, and the "
        "error named disk and remedy",
    )


def test_export_on_a_full_disk_keeps_the_old_bundle(
    namespace, disk, tiny_checkpoint, fp32_bundle, figure
):
    told = script("full_disk", "export", disk, tiny_checkpoint, fp32_bundle.path, wrapper=namespace)
    assert told["status"] == 2, told["error"]
    assert "Traceback" not in told["error"]
    assert f"error: {disk / 'bundle'} cannot be written: no space is left" in told["error"]
    assert told["left"] == ["ballast", "bundle"]
    figure("full disk, export", "exit code 2 and one message; the old bundle stayed whole")


def test_search_build_on_a_full_disk_keeps_the_old_index(
    namespace, disk, fp32_bundle, tmp_path, figure
):
    """With any number of free pages, the build raises an error and does not die of SIGBUS."""
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    rng = np.random.default_rng(0)
    for root, count in ((folder, 120), (elsewhere, 9)):
        root.mkdir()
        for number in range(count):
            grid = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
            grid.resize((48, 40)).save(root / f"{number}.png")
    pictures = sorted([*folder.iterdir(), *elsewhere.iterdir()])
    index, table = tmp_path / "index", tmp_path / "table.npz"
    with LocalClip(fp32_bundle.path) as clip:
        build(folder, index, clip)
        names = list(map(str, pictures))
        np.savez(table, names=names, embeddings=clip.embed_images(pictures))
    told = script("full_disk", "search", disk, index, table, wrapper=namespace)
    assert told["refused"] > 8, told
    figure(
        "full disk, search index",
        f"with 0 to {told['refused'] - 1} pages free the old index stayed whole, and the error "
        "named disk and remedy",
    )


def test_wrapped_disk_full_errors_are_recognized(tmp_path):
    """Some libraries wrap the operating system's error in an exception of their own."""
    expected = r"no space is left on the disk of .*free some space"
    with pytest.raises(StorageError, match=expected), files.disk_errors(tmp_path / "x"):
        raise RuntimeError("cannot save: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="something else"), files.disk_errors(tmp_path / "x"):
        raise RuntimeError("something else")


def test_command_on_a_full_device_exits_with_a_message(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command():
        with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
            full.write(b"x")

    with pytest.raises(SystemExit) as ended:
        run_command(app)
    assert ended.value.code == 2
    assert "error: no space is left on the disk" in capsys.readouterr().err


def test_failed_file_write_keeps_the_old_file(tmp_path):
    """The process may write files of at most 10 bytes."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from serving.errors import InputError\nfrom serving.util.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try:\n    write_text(Path(sys.argv[1]), 'x' * 11)\n"
        "except InputError as error:\n    sys.exit(3)\n"
    )
    write_text(tmp_path / "file", "old")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], cwd=CHECKOUT)
    assert done.returncode == 3
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_temporary_link_is_not_followed(tmp_path):
    """Others could create it in a shared directory, to have one of our files overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    (tmp_path / ".file.tmp").symlink_to(victim)
    write_text(tmp_path / "file", "new")
    assert (victim.read_text(), (tmp_path / "file").read_text()) == ("theirs", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "victim"}
