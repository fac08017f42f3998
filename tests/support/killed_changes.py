"""Kill changes of a search index at every file operation and at random. Run by test_build.py.

    python killed_changes.py INDEX TABLE

TABLE has the names and embeddings of the images of INDEX and of some other images, which are
added. Each change happens in a fork of this process, on a copy of INDEX, and is killed by SIGKILL.
The result must be the intact index of before or after the change, and the change must succeed when
repeated.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import faiss  # noqa: F401  (imported before the forks, so that they do not load it again)
import numpy as np

from serving.search.build import add, remove
from serving.search.index import SearchIndex

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
RANDOM_KILLS = 20


class Recorded:
    """An embedder that looks up the embeddings of images."""

    def __init__(self, table, identity):
        with np.load(table) as saved:
            self.known = dict(zip(saved["names"].tolist(), saved["embeddings"], strict=True))
        self.identity = identity

    def embed_images(self, files):
        return np.stack([self.known[str(file)] for file in files])


def state(path, embedder):
    """Return the paths of an index after checking all of its files."""
    index = SearchIndex.open(path)
    names = [str(index.file(entry.path)) for entry in index.entries]
    np.testing.assert_array_equal(index.embeddings, [embedder.known[name] for name in names])
    rows, _ = index.search(np.array(index.embeddings), 1)
    assert rows[:, 0].tolist() == list(range(len(names)))
    return tuple(entry.path for entry in index.entries)


def forked(action, *arguments):
    child = os.fork()
    if child == 0:
        try:
            action(*arguments)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def die_at(number, change, path):
    """Run `change` and kill it just before file operation `number`."""
    left = number

    def hook(event, arguments):
        nonlocal left
        if event in OPERATIONS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    change(path)


def at_every_operation(first, change, work, embedder):
    """Kill `change` at its first file operation, its second, ... until it completes."""
    done = Path(shutil.copytree(first, work / "done"))
    change(done)
    before, after = state(first, embedder), state(done, embedder)
    assert before != after
    seen = []
    for number in range(1, 10_000):
        path = Path(shutil.copytree(first, work / "copy"))
        _, status = os.waitpid(forked(die_at, number, change, path), 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        seen.append(state(path, embedder))
        assert seen[-1] in (before, after)
        if seen[-1] == before:
            change(path)
        add(path, [], embedder)  # only cleanup operations
        assert state(path, embedder) == after
        left = {item.name for item in path.iterdir()}
        assert left == {"manifest.json", ".lock", "generation-2"}, left
        shutil.rmtree(path)
    assert set(seen) == {before, after}
    return len(seen)


def at_random(first, changes, states, work, embedder):
    def forever(path):
        while True:
            for change in changes:
                change(path)

    path = Path(shutil.copytree(first, work / "random"))
    for _ in range(RANDOM_KILLS):
        child = forked(forever, path)
        time.sleep(random.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert state(path, embedder) in states
    return RANDOM_KILLS


def main(first, table):
    random.seed(0)
    manifest = SearchIndex.open(first).manifest
    embedder = Recorded(table, manifest.model)
    more = [Path(name) for name in embedder.known if not name.startswith(manifest.folder)]

    def adding(path):
        add(path, more, embedder, chunk=2)

    def removing(path):
        remove(path, ["animals/*"])

    kills = {}
    for name, change in (("add", adding), ("remove", removing)):
        with tempfile.TemporaryDirectory(dir=first.parent) as work:
            kills[name] = at_every_operation(first, change, Path(work), embedder)
    with tempfile.TemporaryDirectory(dir=first.parent) as work:
        before = state(first, embedder)
        after = tuple(sorted((*before, *map(str, more))))
        changes = (adding, lambda path: remove(path, ["/*"]))
        kills["random"] = at_random(first, changes, (before, after), Path(work), embedder)
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
