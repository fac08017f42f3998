"""Fill a small disk while files are written to it. Tests run this in its own mount namespace.

    python full_disk.py assemble DISK BUNDLE
    python full_disk.py search DISK INDEX TABLE
    python full_disk.py export DISK CHECKPOINT BUNDLE

DISK is an empty directory, on which a tmpfs is mounted. For every number of free bytes that is
tried, existing files must stay intact, no other files may be left, and the error must name the
cause. Prints JSON.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from serving.bundles.bundle import Bundle
from serving.errors import StorageError
from serving.search.build import add
from serving.search.index import SearchIndex
from serving.triton.repository import assemble
from tests.support.killed_changes import Recorded, state
from tests.support.killed_writes import check_bundle, check_repository, contents

PAGE = 4096


def mount(disk, size):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)


def leave_free(disk, size):
    """Fill the disk, leaving `size` bytes free."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    free = os.statvfs(disk).f_bavail * PAGE
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - size)


def refusal(change, target):
    """Return the error that a change raises on the full disk, or None if there was room."""
    try:
        change()
    except StorageError as error:
        message = str(error)
    else:
        return None
    assert message.startswith(str(target)), message
    assert "free some space, or write elsewhere" in message
    return message.rpartition("(")[2]


def refused(disk, target, change, sizes):
    """Check that `change` fails for lack of space, and changes nothing, at each of `sizes` free
    bytes."""
    before = contents(target)
    causes = set()
    for size in sizes:
        leave_free(disk, size)
        cause = refusal(change, target)
        assert cause is not None, f"{size} bytes were enough"
        causes.add(cause)
        assert contents(target) == before, size
        assert {path.name for path in disk.iterdir()} == {target.name, "ballast"}, size
    (disk / "ballast").unlink()
    change()
    assert contents(target) != before
    return {"refused": len(sizes), "causes": sorted(causes)}


def searched(disk, index, table):
    """Add images to an index with no, one, two, ... free pages until the change succeeds."""
    manifest, target = SearchIndex.open(index).manifest, disk / "index"
    embedder = Recorded(table, manifest.model)
    before = state(index, embedder)
    more = [Path(name) for name in embedder.known if not name.startswith(manifest.folder)]
    causes = set()
    for pages in range(1000):
        (disk / "ballast").unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(index, target)
        leave_free(disk, pages * PAGE)
        cause = refusal(lambda: add(target, more, embedder, chunk=2), target)
        if cause is None:
            break
        causes.add(cause)
        assert state(target, embedder) == before
        kept = {"manifest.json", ".lock", "generation-1", "pending", "unfinished.json"}
        assert {path.name for path in target.iterdir()} <= kept
    assert len(state(target, embedder)) == len(before) + len(more)
    return {"refused": pages, "causes": sorted(causes)}


def main(what, disk, *arguments):
    if what == "assemble":
        mount(disk, "48m")
        bundle, target = Bundle.open(Path(arguments[0])), disk / "repository"
        assemble(bundle, target, runner="onnxruntime:fp32", max_batch_size=8)
        needed = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        sizes = [*range(0, 16 * PAGE, 3 * PAGE), *range(16 * PAGE, needed, needed // 8)]
        told = refused(
            disk,
            target,
            lambda: assemble(bundle, target, runner="onnxruntime:fp32", max_batch_size=16),
            sizes,
        )
        check_repository(target)
    elif what == "search":
        mount(disk, "8m")
        told = searched(disk, *map(Path, arguments))
    else:
        mount(disk, "64m")
        checkpoint, bundle = arguments
        target = disk / "bundle"
        shutil.copytree(bundle, target)
        check_bundle(target)
        # Enough for the tokenizer, which is written first, but not for the first graph.
        leave_free(disk, (target / "tokenizer.json").stat().st_size + (100 << 10))
        before = contents(target)
        command = [sys.executable, "-m", "export", checkpoint, "--output", str(target)]
        done = subprocess.run(
            [*command, "--precision", "fp16"], capture_output=True, text=True, check=False
        )
        assert contents(target) == before
        told = {"status": done.returncode, "error": done.stderr}
        told["left"] = sorted(path.name for path in disk.iterdir())
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
