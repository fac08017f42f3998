"""Options that name outputs: they are checked before the work, and devices are never replaced."""

import io
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.devices import device
from tests.support.paths import CHECKOUT

NOWHERE = ("--bundle", "/nowhere/bundle")  # an error after the check of outputs


@pytest.fixture
def local(tiny_bundle):
    return "--bundle", tiny_bundle.path, "--runner", "onnxruntime:fp32"


@pytest.fixture
def bad(tmp_path):
    """Paths that no file and no directory can be written to."""
    (tmp_path / "file").write_text("a file")
    return (tmp_path / "file" / "below", tmp_path / ("n" * 256), Path("/proc/out"), Path("-"))


def commands(images, index):
    """Command lines whose last argument is an output."""
    labels = Path(images) / "labels.txt"
    return {
        "files": (
            ("embed", "--text", "x", *NOWHERE, "--output"),
            ("search", "query", index, "x", *NOWHERE, "--sheet"),
            ("demo", "/nowhere", images, "--labels", labels, "--query", "x", "--sheet"),
        ),
        "directories": (
            ("search", "build", images, *NOWHERE, "--output"),
            ("bulk", images, *NOWHERE, "--output"),
            ("assemble", "/nowhere", "--output"),
            ("export", "random:ViT-B-32", "--output"),
        ),
    }


def test_outputs_are_checked_before_the_work(run, bad, pictures, tmp_path, tiny_bundle):
    """The bundle of these commands does not exist, and its error would come later."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes((pictures / "wide.jpg").read_bytes())
    (images / "labels.txt").write_text("x\n")
    null = device("null", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    wanted = commands(images, tmp_path / "index")
    for command in wanted["files"]:
        for path in (*bad, tmp_path):
            if path == Path("-") and command[0] == "embed":
                continue
            code, out, err = run(*command, path)
            assert (code, out) == (2, ""), command
            assert "nowhere" not in err, command
    for command in wanted["directories"]:
        for path in (*bad, tmp_path / "file", null):
            if command[:2] == ("search", "build") or command[0] == "bulk":
                command = [str(tiny_bundle.path) if a == NOWHERE[1] else a for a in command]
            code, out, err = run(*command, path)
            assert (code, out) == (2, ""), command
            assert "nowhere" not in err, command
    assert sorted(tmp_path.rglob("*")) == before


def test_embeddings_are_written_to_devices_links_and_missing_directories(run, local, tmp_path):
    command = ("embed", "--text", "a", *local, "--output")
    null, full = (device(name, tmp_path) for name in ("null", "full"))
    for path in (null, tmp_path / "new" / "directory" / "out.npz"):
        code, _, err = run(*command, path)
        assert code == 0, err
    assert stat.S_ISCHR(null.stat().st_mode)
    with np.load(tmp_path / "new" / "directory" / "out.npz") as saved:
        assert saved["names"].tolist() == ["a"]
    code, _, err = run(*command, full)
    assert (code, "no space is left" in err) == (2, True)
    link = tmp_path / "link.npz"
    link.symlink_to(tmp_path / "new" / "directory" / "out.npz")
    assert run(*command, link)[0] == 0
    assert link.is_symlink()
    longest = tmp_path / ("n" * 251 + ".npz")
    assert run(*command, longest)[0] == 0
    assert longest.is_file()
    left = {path.name for path in tmp_path.iterdir()} - {"null", "full"}
    assert left == {"new", "link.npz", longest.name}
    assert [path.name for path in (tmp_path / "new" / "directory").iterdir()] == ["out.npz"]


@pytest.mark.parametrize("name", ["-", "/dev/fd/1"])
def test_embeddings_on_standard_output(local, name):
    command = [sys.executable, "-m", "serving", "embed", "--text", "a", *map(str, local)]
    done = subprocess.run([*command, "--output", name], cwd=CHECKOUT, capture_output=True)
    assert done.returncode == 0, done.stderr
    with np.load(io.BytesIO(done.stdout)) as saved:
        assert saved["embeddings"].shape == (1, 32)


def test_embeddings_and_json_cannot_share_standard_output(run):
    code, out, _ = run("embed", "--text", "a", *NOWHERE, "--output", "-", "--json")
    assert (code, out) == (2, "")
