"""Kills what writes a directory over a good one, and looks at what is left; run by a test.

    python killed_writes.py assemble BUNDLE WORK KILLS
    python killed_writes.py export CHECKPOINT WORK KILLS

Each run happens in a fork of this process and dies by SIGKILL, at one of its file operations or
after a random time. What is left must be an output, whole; in the end a run must succeed, and leave
nothing of all that behind. Prints, as JSON, how the runs ended.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from killed_changes import OPERATIONS, die_at, forked

from export.build import Options, build
from export.checkpoint import load_checkpoint
from serving.bundle import Bundle
from serving.commands import silent
from serving.repository import assemble


def contents(folder):
    """What a directory holds: relative path -> sha256."""
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
    assert set(contents(path)) == {"manifest.json", *vouched}


def check_repository(path):
    models = {config.parent.name for config in path.glob("*/config.pbtxt")}
    assert len(models) == 7, models
    for name in ("image_tower", "text_tower"):
        bundle = Bundle.open(path / name / "1" / "bundle")
        bundle.verified(bundle.artifact(name.partition("_")[0], "fp32"))
    for name in ("text_tokenize", "clip_zero_shot"):
        assert Bundle.open(path / name / "1" / "bundle").tokenizer.is_file()


def counted(change):
    """How many file operations a whole run makes, and its seconds; in a fork."""
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


def killed_at(point, change, target):
    """Kill a run at its file operation `point`, an int, or after `point` seconds, a float."""
    if isinstance(point, int):
        child = forked(die_at, point, lambda _: change(), target)
    else:
        child = forked(change)
        time.sleep(point)
        os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), f"not killed at {point}"


def main(what, source, work, kills):
    target = work / "target"
    if what == "assemble":
        bundle, check = Bundle.open(source), check_repository
        assemble(bundle, target, runner="onnxruntime:fp32", max_batch_size=8)

        def change():
            assemble(bundle, target, runner="onnxruntime:fp32", max_batch_size=16)
    else:
        checkpoint, check = load_checkpoint(str(source)), check_bundle

        def change():
            build(checkpoint, target, silent, Options(kinds=()))

        change()
    count, seconds = counted(change)
    rng = random.Random(0)
    points = rng.sample(range(1, count + 1), min(count, kills - kills // 2))
    points += [rng.uniform(0, 0.9 * seconds) for _ in range(kills // 2)]
    changed = littered = 0
    for point in points:
        before = contents(target)
        killed_at(point, change, target)
        check(target)
        changed += contents(target) != before
        littered += {path.name for path in work.iterdir()} != {"target"}
    change()
    check(target)
    assert [path.name for path in work.iterdir()] == ["target"]
    told = {"kills": len(points), "changed": changed, "littered": littered}
    print(json.dumps({**told, "operations": count, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
