"""Bulk embedding on a real Ray cluster: every source, bad files, killed workers and jobs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.bulk.ray_pool import Resources
from serving.errors import InputError
from tests.support.bulk_data import (
    RUNNER,
    assert_complete,
    command,
    embeddings_of,
    rows_of,
    run,
    tar_of,
)
from tests.support.paths import CHECKOUT

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and logs open
]

BAD = {
    "empty.jpg": (b"", "is empty"),
    "page.png": (b"<!doctype html><p>not found", "web page"),
    "text.jpg": (b"no picture, only text", "start with b'no picture"),
}


def test_all_images_of_a_directory_are_embedded(finished, many, local):
    assert_complete(finished.output, many, local)
    assert (finished.rows, finished.ok, finished.errors) == (300, 300, 0)
    assert (finished.shards, finished.skipped_shards, finished.workers) == (5, 0, 2)
    assert finished.embedded_rows == 300
    assert finished.rows_per_s > 0


def test_schema_and_manifest_describe_the_job(finished, fp32_bundle, many):
    schema = pq.read_schema(Path(finished.output) / "shard-00000.parquet")
    assert schema.field("path").type == pa.string()
    assert schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert schema.field("status").type == schema.field("error").type == pa.string()
    manifest = json.loads((Path(finished.output) / "manifest.json").read_text())
    assert manifest["source"] == {
        "location": str(many),
        "kind": "pictures",
        "image_column": None,
        "path_column": None,
    }
    provenance = fp32_bundle.manifest.provenance
    assert manifest["weights_sha256"] == provenance.weights_sha256
    assert (manifest["model"], manifest["embed_dim"]) == (fp32_bundle.manifest.name, 32)
    assert (manifest["shard_size"], manifest["shards"], manifest["runner"]) == (64, 5, RUNNER)


def test_hugging_face_parquet_is_embedded_with_runner_auto(
    cluster, fp32_bundle, pictures, local, tmp_path
):
    """The images are structs of bytes and path, in row groups. A worker selects the runner."""
    files = sorted(pictures.iterdir())
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"label": list(range(len(files))), "image": images})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=3)
    outcome = run(tmp_path, tmp_path.parent / "hf", fp32_bundle, runner="auto", shard_size=3)
    assert outcome.runner in {"onnxruntime:fp32", "openvino:fp32", "openvino:bf16"}
    assert (outcome.rows, outcome.errors, outcome.shards) == (len(files), 0, 3)
    rows = rows_of(outcome.output)
    assert [row["path"] for row in rows] == [file.name for file in files]
    cosines = (embeddings_of(rows) * local.embed_images(files)).sum(axis=1)
    assert cosines.min() > 0.995


def test_damaged_rows_of_parquet_are_reported(cluster, fp32_bundle, pictures, local, tmp_path):
    files = sorted(pictures.iterdir())
    source = tmp_path / "source"
    source.mkdir()
    data = [file.read_bytes() for file in files]
    columns = {"jpeg": [None, *data[1:]], "url": [f"https://{file.name}" for file in files]}
    options = {"row_group_size": 4, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table(columns), source / "a.parquet", **options)
    damaged = bytearray((source / "a.parquet").read_bytes())
    second = pq.read_metadata(source / "a.parquet").row_group(1).column(0)
    damaged[second.data_page_offset : second.data_page_offset + 30] = bytes(30)
    (source / "b.parquet").write_bytes(damaged)
    (source / "c.parquet").write_bytes(b"PAR1 and no more")
    outcome = run(
        source,
        tmp_path / "out",
        fp32_bundle,
        image_column="jpeg",
        path_column="url",
        shard_size=100,
    )
    rows = rows_of(outcome.output)
    assert (outcome.rows, outcome.ok, outcome.errors) == (17, 10, 7)
    assert [row["path"] for row in rows[:8]] == columns["url"]
    expected = local.embed_images(files)
    np.testing.assert_allclose(embeddings_of(rows[1:8]), expected[1:], atol=1e-6)
    np.testing.assert_allclose(embeddings_of(rows[9:12]), expected[1:4], atol=1e-6)
    assert (rows[8]["path"], rows[12]["path"]) == (columns["url"][0], "b.parquet#4")
    errors = {row["path"]: row["error"].lower() for row in rows if row["status"] == "error"}
    assert all(row["embedding"] == [0] * 32 for row in rows if row["status"] == "error")
    assert errors.pop("https://" + files[0].name) == "no image: the column is null"
    assert "cannot be read: " in errors.pop("c.parquet")
    assert set(errors) == {f"b.parquet#{index}" for index in range(4, 8)}
    assert all("row group 1 of b.parquet is damaged" in reason for reason in errors.values())


def test_damaged_tars_are_reported(cluster, fp32_bundle, pictures, local, tmp_path):
    files = sorted(pictures.iterdir())
    members = {}
    for file in files:
        members[f"deep/{file.stem}.json"] = b"{}"
        members[f"deep/{file.name}"] = file.read_bytes()
    whole = tar_of(tmp_path / "0.tar", members).read_bytes()
    tar_of(tmp_path / "1.tar", {"a.txt": b"no picture"})
    (tmp_path / "2.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "3.tar").write_bytes(whole[: whole.index(files[1].read_bytes()[:64]) + 100])
    out = tmp_path / "out"
    outcome = run(tmp_path / "*.tar", out, fp32_bundle)
    rows = rows_of(out)
    assert (outcome.rows, outcome.ok, outcome.errors) == (len(files) + 4, len(files) + 1, 3)
    assert [row["path"] for row in rows[: len(files)]] == [f"0.tar/deep/{f.name}" for f in files]
    expected = local.embed_images(files)
    np.testing.assert_allclose(embeddings_of(rows[: len(files)]), expected, atol=1e-6)
    assert rows[-2]["path"] == f"3.tar/deep/{files[0].name}"
    np.testing.assert_allclose(embeddings_of(rows[-2:-1]), expected[:1], atol=1e-6)
    errors = {name: reason.lower() for name, reason in outcome.first_errors}
    assert set(errors) == {"1.tar", "2.tar", "3.tar"}
    assert "no images in this tar" in errors["1.tar"]
    assert "truncated or damaged after 0 images" in errors["2.tar"]
    assert "truncated or damaged after 1 images" in errors["3.tar"]


def test_bad_images_are_reported(cluster, fp32_bundle, pictures, local, tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    good = sorted(pictures.glob("*.jpg"))
    for file in good:
        (root / file.name).hardlink_to(file)
    for name, (data, _) in BAD.items():
        (root / name).write_bytes(data)
    cut = (pictures / "wide.jpg").read_bytes()[:-40]
    (root / "cut.jpg").write_bytes(cut)
    (root / "gone.jpg").symlink_to("nowhere")
    (root / os.fsdecode(b"caf\xe9.jpg")).write_bytes(good[0].read_bytes())
    os.mkfifo(root / "pipe.jpg")  # reading a pipe would block forever
    outcome = run(root, tmp_path / "out", fp32_bundle)
    rows = {row["path"]: row for row in rows_of(outcome.output)}
    assert len(rows) == len(good) + len(BAD) + 4 == outcome.rows
    assert outcome.errors == len(BAD) + 3
    assert len(outcome.first_errors) == 5
    for name, (_, reason) in BAD.items():
        assert reason.lower() in rows[name]["error"].lower()
    assert "truncated" in rows["cut.jpg"]["error"].lower()
    assert rows["gone.jpg"]["error"].lower() == "is a link to a file that does not exist"
    assert rows["pipe.jpg"]["error"].lower() == "is a pipe, not a file"
    expected = local.embed_images(good)
    found = embeddings_of([rows[file.name] for file in good])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert rows["caf\\udce9.jpg"]["status"] == "ok"


def children_of(pid: int) -> dict[int, str]:
    """Return the descendants of a process and their command lines."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            names[int(stat.parent.name)] = (stat.parent / "cmdline").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return {child: names[child] for child in found - {pid}}


def test_job_survives_a_killed_worker(cluster, fp32_bundle, many, local, tmp_path):
    def map_workers() -> set[int]:
        return {pid for pid, name in children_of(os.getpid()).items() if "MapWorker" in name}

    killed, earlier = [], map_workers()  # workers of another job may still be ending

    def kill(step: str, done: int = 0, total: int = 0) -> None:
        workers = sorted(map_workers() - earlier)
        if len(workers) == 2 and done >= 4 and not killed:
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])

    crew = Resources(workers=2, threads=1)
    outcome = run(many, tmp_path / "out", fp32_bundle, resources=crew, shard_size=8, progress=kill)
    assert killed
    assert (outcome.rows, outcome.errors, outcome.shards) == (300, 0, 38)
    assert_complete(outcome.output, many, local)


def alive(pids) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_killed_job_resumes(fp32_bundle, many, local, tmp_path):
    """The job runs as a command, which starts and stops Ray itself."""
    out = tmp_path / "out"
    arguments = ("--output", out, "--bundle", fp32_bundle.path, "--runner", RUNNER)
    line = command(many, *arguments, "--shard-size", 3, "--json")
    with subprocess.Popen(
        line, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        deadline = time.monotonic() + 120
        while len(list(out.glob("shard-*.parquet"))) < 5:
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        family = children_of(job.pid)
        job.kill()
    working = [pid for pid, name in family.items() if "MapWorker" in name]
    assert working
    while alive(working):  # they end with the job, but two of Ray's agents need another minute
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for pid in alive(family):
        os.kill(pid, signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    assert 5 <= len(before) < 100
    done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["rows"], outcome["ok"], outcome["shards"]) == (300, 300, 100)
    assert outcome["skipped_shards"] == len(before)
    assert outcome["embedded_rows"] == 300 - 3 * len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_complete(out, many, local)
    assert "100 %" in done.stderr
    assert "Warning" not in done.stderr
    assert "[E " not in done.stderr


def test_image_that_kills_its_worker_is_reported(finished, fp32_bundle, many, tmp_path):
    """Image 5 kills every process that reads it. The images after it are still embedded."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "shards.jsonl").write_text((Path(finished.output) / "shards.jsonl").read_text())
    code = f"""
import os, sys
import numpy as np
import serving.bulk.worker as worker
from pathlib import Path
from serving.bulk.sources import find_source
real = worker.preprocess
def deadly(picture, spec):
    if picture.name == "035.jpg":
        os.kill(os.getpid(), 9)
    return real(picture, spec)
worker.preprocess = deadly
source, *_ = find_source({str(many)!r})
job = worker.Job(source=source, output=Path({str(out)!r}), bundle=Path({str(fp32_bundle.path)!r}),
                 runner={RUNNER!r}, threads=1, batch_size=8)
answer = worker.Worker(job)({{"shard": np.array([0]), "offset": np.array([0])}})
assert answer["rows"] == [64] and answer["failure"] == [""], answer
"""
    codes = [
        subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=False).returncode
        for _ in range(6)
    ]
    assert codes == [-9] * 5 + [0]
    rows = rows_of(out)
    assert Counter(row["status"] for row in rows) == {"ok": 63, "error": 1}
    assert rows[5]["path"] == "0/deep/035.jpg"
    assert "this image crashed the process" in rows[5]["error"].lower()
    alike = rows_of(finished.output)[:64]
    assert [row["path"] for row in rows] == [row["path"] for row in alike]


def test_job_runs_as_a_task_of_the_cluster(cluster, fp32_bundle, many, local, tmp_path):
    """The same as with `ray://`, but without its client, through which Ray Data does not work."""
    told = []
    crew = Resources(address="ray://not-asked:10001")
    outcome = run(
        many,
        tmp_path / "out",
        fp32_bundle,
        resources=crew,
        shard_size=60,
        progress=lambda step, done=0, total=0: told.append((step, done, total)),
    )
    assert (outcome.rows, outcome.shards) == (300, 5)
    assert_complete(outcome.output, many, local)
    assert told[0] == ("dividing the source into shards", 0, 0)
    assert [done for _, done, total in told if total == 5] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="is inside SOURCE"):
        run(many, many / "out", fp32_bundle, resources=crew)
