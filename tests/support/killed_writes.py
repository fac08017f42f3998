"""Kill processes that overwrite a complete directory, and check the result. Run by a test.

    python killed_writes.py assemble BUNDLE WORK KILLS
    python killed_writes.py export CHECKPOINT BUNDLE WORK KILLS

Each run happens in a fork of this process and is killed by SIGKILL after a random fraction of the
time of a whole run. Assemblies are also killed at each file operation. The directory must then hold
a complete output. A final run must succeed and leave no temporary files. Prints as JSON how the
runs ended.
"""

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from export.checkpoints.load import load_checkpoint
from export.pipeline import Options, build
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS
from serving.triton.repository import assemble
from serving.util.progress import silent
from tests.support.killed_changes import OPERATIONS, die_at, forked


def contents(folder):
    """Map the relative path of each file of a directory to its SHA-256."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_bundle(path):
    bundle = Bundle.open(path)
    assert bundle.tokenizer.is_file()
    for artifact in bundle.manifest.artifacts:
        bundle.verified(artifact)
    vouched = {file.name for file in bundle.manifest.files}
    assert set(contents(path)) - {".lock"} == {"manifest.json", *vouched}


def check_repository(path):
    models = {config.parent.name for config in path.glob("*/config.pbtxt")}
    assert len(models) == 9, models
    for tower in TOWERS:
        bundle = Bundle.open(path / f"{tower}_tower" / "1" / "bundle")
        bundle.verified(bundle.artifact(tower, "fp32"))
    for name in ("text_tokenize", "clip_zero_shot"):
        assert Bundle.open(path / name / "1" / "bundle").tokenizer.is_file()


def counted(change):
    """Return the file operations and seconds of a whole run, measured in a fork."""
    reader, writer = os.pipe()

    def run():
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            seen += event in OPERATIONS

        sys.addaudithook(hook)
        start = time.monotonic()
        change()
        os.write(writer, json.dumps([seen, time.monotonic() - start]).encode())

    assert os.waitpid(forked(run), 0)[1] == 0
    return json.loads(os.read(reader, 1000))


def killed_after(seconds, change):
    """Kill a run. A run that finished before the kill must have succeeded."""
    child = forked(change)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def killed_at(operation, change):
    status = os.waitpid(forked(die_at, operation, lambda _: change(), None), 0)[1]
    assert status == signal.SIGKILL, status
    return True


def survived(work, kills, check, again):
    """Do all `kills` over one output and check it after each. Then do a whole run."""
    told = {"kills": 0, "changed": 0, "littered": 0}
    target = work / "target"
    for kill in kills:
        before = target.stat().st_ino
        told["kills"] += kill()
        check(target)
        told["changed"] += target.stat().st_ino != before
        told["littered"] += {path.name for path in work.iterdir()} != {"target"}
    again()
    check(target)
    assert [path.name for path in work.iterdir()] == ["target"]
    return told


def assembled(bundle, work, count):
    def change(size=16):
        options = {"runner": "onnxruntime:fp32", "max_batch_size": size}
        assemble(Bundle.open(bundle), work / "target", **options)

    change(8)
    operations, seconds = counted(change)
    rng = random.Random(0)
    kills = [
        functools.partial(killed_at, operation, change)
        for operation in [
            *rng.sample(range(1, operations), min(operations - 1, count // 2)),
            *range(operations - 2, operations + 1),  # after the new directory is in place
        ]
    ]
    while len(kills) < count:
        kills.append(functools.partial(killed_after, rng.uniform(0, seconds), change))
    return survived(work, kills, check_repository, change)


def exported(source, bundle, work, count):
    checkpoint, target, rng = load_checkpoint(str(source)), work / "target", random.Random(0)
    shutil.copytree(bundle, target)
    change = functools.partial(build, checkpoint, target, silent, Options(precisions=()))
    _, seconds = counted(change)
    kills = [
        functools.partial(killed_after, rng.uniform(0, 0.9 * seconds), change) for _ in range(count)
    ]
    return survived(work, kills, check_bundle, change)


if __name__ == "__main__":
    what, *paths, number = sys.argv[1:]
    run = {"assemble": assembled, "export": exported}[what]
    print(json.dumps(run(*map(Path, paths), int(number))))
