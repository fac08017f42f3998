"""Bulk embedding on a real Ray: every source, bad files, killed workers and jobs, refusals."""

import faulthandler
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from PIL import Image

from serving.bulk.job import bulk_embed
from serving.bulk.ray_pool import Resources
from serving.bulk.sources import Shard, find_source, read_shard, shards_of
from serving.bundles.bundle import Bundle
from serving.clients.local import LocalClip
from serving.errors import BundleError, InputError, RunnerError
from tests.support.paths import CHECKOUT

# Ray Data 2.60 warns of its own settings while it reads them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of the sockets and logs of Ray
]
RUNNER = "onnxruntime:fp32"
BAD = {
    "empty.jpg": (b"", "is empty"),
    "page.png": (b"<!doctype html><p>not found", "web page"),
    "text.jpg": (b"no picture, only text", "start with b'no picture"),
}


@pytest.fixture(scope="module")
def cluster(request):
    """One Ray for the module; `bulk_embed` takes the one that runs."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=128 << 20,
    )
    yield
    ray.shutdown()
    # Ray (2.60) takes the handlers of crashes away: a later one would end pytest without a word.
    faulthandler.enable(request.config.stash[fault_handler_stderr_fd_key])


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """300 small pictures in nested folders."""
    root = tmp_path_factory.mktemp("many") / "pictures"
    rng = np.random.default_rng(1)
    for index in range(300):
        folder = root / f"{index % 7}" / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        grid = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        grid.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{index:03}.jpg")
    return root


@pytest.fixture(scope="module")
def local(fp32_bundle):
    with LocalClip(fp32_bundle.path, RUNNER) as clip:
        yield clip


@pytest.fixture(scope="module")
def finished(cluster, fp32_bundle, many, tmp_path_factory):
    """The outcome of a finished job over `many`, of two workers; do not change it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return run(many, out, fp32_bundle, resources=Resources(workers=2), shard_size=64)


def run(source, out, bundle, **options):
    return bulk_embed(str(source), out, bundle.path, **{"runner": RUNNER, **options})


def rows_of(out) -> list[dict]:
    names = sorted(path for path in Path(out).glob("shard-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in names]).to_pylist()


def embeddings_of(rows) -> np.ndarray:
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    assert [row["error"] for row in rows] == [None] * len(rows)
    return np.array([row["embedding"] for row in rows], np.float32)


def assert_complete(out, root: Path, local) -> None:
    """Each picture below `root` once, in the order of the names, embedded as in process."""
    files = sorted(root.rglob("*.jpg"))
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [file.relative_to(root).as_posix() for file in files]
    np.testing.assert_allclose(embeddings_of(rows), local.embed_images(files), atol=1e-6)
    left = {path.name for path in Path(out).iterdir() if not path.name.startswith("shard-")}
    assert left <= {"manifest.json", "shards.jsonl", ".lock"}


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ------------------------------------------------------------------ what is right


def test_a_folder(finished, many, local):
    assert_complete(finished.out, many, local)
    assert (finished.rows, finished.ok, finished.errors) == (300, 300, 0)
    assert (finished.shards, finished.skipped_shards, finished.workers) == (5, 0, 2)
    assert finished.embedded_rows == 300
    assert finished.rows_per_s > 0


def test_the_schema_and_the_manifest(finished, fp32_bundle, many):
    schema = pq.read_schema(Path(finished.out) / "shard-00000.parquet")
    assert schema.field("path").type == pa.string()
    assert schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert schema.field("status").type == schema.field("error").type == pa.string()
    manifest = json.loads((Path(finished.out) / "manifest.json").read_text())
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


def test_hugging_face_parquet_and_auto(cluster, fp32_bundle, pictures, local, tmp_path):
    """A struct of bytes and path, in row groups; the runner is chosen on a worker."""
    files = sorted(pictures.iterdir())
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"label": list(range(len(files))), "image": images})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=3)
    outcome = run(tmp_path, tmp_path.parent / "hf", fp32_bundle, runner="auto", shard_size=3)
    assert outcome.runner in {"onnxruntime:fp32", "openvino:fp32", "openvino:bf16"}
    assert (outcome.rows, outcome.errors, outcome.shards) == (len(files), 0, 3)
    rows = rows_of(outcome.out)
    assert [row["path"] for row in rows] == [file.name for file in files]
    cosines = (embeddings_of(rows) * local.embed_images(files)).sum(axis=1)
    assert cosines.min() > 0.995


def test_parquet_by_columns_with_damage(cluster, fp32_bundle, pictures, local, tmp_path):
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
    rows = rows_of(outcome.out)
    assert (outcome.rows, outcome.ok, outcome.errors) == (17, 10, 7)
    assert [row["path"] for row in rows[:8]] == columns["url"]
    expected = local.embed_images(files)
    np.testing.assert_allclose(embeddings_of(rows[1:8]), expected[1:], atol=1e-6)
    np.testing.assert_allclose(embeddings_of(rows[9:12]), expected[1:4], atol=1e-6)
    assert (rows[8]["path"], rows[12]["path"]) == (columns["url"][0], "b.parquet#4")
    errors = {row["path"]: row["error"] for row in rows if row["status"] == "error"}
    assert all(row["embedding"] == [0] * 32 for row in rows if row["status"] == "error")
    assert errors.pop("https://" + files[0].name) == "no picture: the column is null"
    assert "cannot be read: " in errors.pop("c.parquet")
    assert set(errors) == {f"b.parquet#{index}" for index in range(4, 8)}
    assert all("row group 1 of b.parquet is damaged" in reason for reason in errors.values())


def test_web_dataset_with_damage(cluster, fp32_bundle, pictures, local, tmp_path):
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
    errors = dict(outcome.first_errors)
    assert set(errors) == {"1.tar", "2.tar", "3.tar"}
    assert "no pictures in this tar" in errors["1.tar"]
    assert "cut off or damaged after 0 pictures" in errors["2.tar"]
    assert "cut off or damaged after 1 pictures" in errors["3.tar"]


def test_bad_pictures_are_told_of(cluster, fp32_bundle, pictures, local, tmp_path):
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
    os.mkfifo(root / "pipe.jpg")  # would be waited for, for ever
    outcome = run(root, tmp_path / "out", fp32_bundle)
    rows = {row["path"]: row for row in rows_of(outcome.out)}
    assert len(rows) == len(good) + len(BAD) + 3 == outcome.rows
    assert outcome.errors == len(BAD) + 2 == len(outcome.first_errors)
    for name, (_, reason) in BAD.items():
        assert reason in rows[name]["error"]
    assert "truncated" in rows["cut.jpg"]["error"]
    assert "no such file" in rows["gone.jpg"]["error"]
    expected = local.embed_images(good)
    found = embeddings_of([rows[file.name] for file in good])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert rows["caf\\udce9.jpg"]["status"] == "ok"


# ------------------------------------------------------------------ what is killed


def children_of(pid: int) -> dict[int, str]:
    """Descendants of a process and their command lines."""
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


def test_a_killed_worker(cluster, fp32_bundle, many, local, tmp_path):
    killed = []

    def kill(step: str, done: int = 0, total: int = 0) -> None:
        workers = [p for p, name in children_of(os.getpid()).items() if "MapWorker" in name]
        if done == 4 and not killed:
            assert len(workers) == 2
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])

    crew = Resources(workers=2, threads=1)
    outcome = run(many, tmp_path / "out", fp32_bundle, resources=crew, shard_size=8, progress=kill)
    assert killed
    assert (outcome.rows, outcome.errors, outcome.shards) == (300, 0, 38)
    assert_complete(outcome.out, many, local)


def alive(pids) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "serving", "bulk", *map(str, arguments)]


def test_a_killed_job_goes_on(fp32_bundle, many, local, tmp_path):
    """By the command, which starts and stops Ray itself."""
    out = tmp_path / "out"
    arguments = ("--out", out, "--bundle", fp32_bundle.path, "--runner", RUNNER)
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
    while alive(working):  # they end with the job; two of Ray's agents take a minute more
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


def test_a_picture_that_kills_its_worker(finished, fp32_bundle, many, tmp_path):
    """Each process dies of picture 5; what comes after it is embedded all the same."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "shards.jsonl").write_text((Path(finished.out) / "shards.jsonl").read_text())
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
source, _ = find_source({str(many)!r})
job = worker.Job(source=source, out=Path({str(out)!r}), bundle=Path({str(fp32_bundle.path)!r}),
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
    assert "the process died of this picture" in rows[5]["error"]
    alike = rows_of(finished.out)[:64]
    assert [row["path"] for row in rows] == [row["path"] for row in alike]


def test_as_a_task_of_the_cluster(cluster, fp32_bundle, many, local, tmp_path):
    """What `ray://` does, less the client itself: Ray Data does not work through it."""
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
    assert_complete(outcome.out, many, local)
    assert told[0] == ("cutting the source into shards", 0, 0)
    assert [done for _, done, total in told if total == 5] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="is inside of SOURCE"):
        run(many, many / "out", fp32_bundle, resources=crew)


# ------------------------------------------------------------------ what is done already


def test_a_finished_job_needs_no_ray(finished, fp32_bundle, many):
    """And says so; a shard that was damaged since is made again."""
    again = run(many, Path(finished.out), fp32_bundle, runner="auto")
    assert (again.rows, again.skipped_shards, again.embedded_rows) == (300, 5, 0)
    assert (again.workers, again.rows_per_s, again.source_changed) == (0, 0.0, False)


def test_a_damaged_shard_is_made_again(finished, fp32_bundle, many, local, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for path in Path(finished.out).iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    (out / "shard-00003.parquet").write_bytes(b"PAR1")
    again = run(many, out, fp32_bundle)
    assert (again.rows, again.skipped_shards, again.embedded_rows) == (300, 4, 64)
    assert_complete(out, many, local)


def test_a_changed_source_is_told_of(finished, fp32_bundle, many):
    new = many / "new.jpg"
    new.hardlink_to(many / "0" / "deep" / "000.jpg")
    try:
        again = run(many, Path(finished.out), fp32_bundle)
    finally:
        new.unlink()
    assert again.source_changed
    assert again.rows == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 65}, "its shard size is 64, not 65"),
        ({"runner": "openvino:fp32"}, "its runner is onnxruntime:fp32, not openvino:fp32"),
    ],
)
def test_another_job_is_refused(finished, fp32_bundle, many, options, message):
    with pytest.raises(InputError, match=message):
        run(many, Path(finished.out), fp32_bundle, **options)


def test_another_source_is_refused(finished, fp32_bundle, pictures):
    with pytest.raises(InputError, match=r"its source is .*, not .*; give another --out"):
        run(pictures, Path(finished.out), fp32_bundle)


def test_another_model_is_refused(finished, fp32_bundle, many, tmp_path):
    manifest = fp32_bundle.manifest
    provenance = replace(manifest.provenance, weights_sha256="0" * 64)
    for path in fp32_bundle.path.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / "manifest.json").unlink()
    text = replace(manifest, name="other", provenance=provenance).to_json()
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="its model is tiny-clip, not other; its sha256 of"):
        run(many, Path(finished.out), Bundle.open(tmp_path))


def test_a_folder_of_something_else_is_refused(fp32_bundle, many, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"holds other things, such as thesis.txt, and no man"):
        run(many, tmp_path, fp32_bundle)
    with pytest.raises(InputError, match="is a file; expected the name of a folder"):
        run(many, tmp_path / "thesis.txt", fp32_bundle)
    with pytest.raises(InputError, match="is not of a bulk job"):
        run(many, fp32_bundle.path, fp32_bundle)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / ".lock").exists()


def test_two_jobs_at_once_are_refused(fp32_bundle, many, tmp_path):
    import fcntl

    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another job is writing to"):
            run(many, tmp_path, fp32_bundle)


# ------------------------------------------------------------------ what is refused


def test_sources_that_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file or folder; expected a folder of pictures"):
        find_source(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nothing to embed; expected a folder of pictures"):
        find_source(str(tmp_path))
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"data.zip: nothing to embed; .* WebDataset tars"):
        find_source(str(tmp_path / "data.zip"))
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match="holds pictures, which have no columns"):
        find_source(str(tmp_path), image_column="image")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(InputError, match=r"holds 1 Parquet files and 1 pictures; say .*\*.jpg'"):
        find_source(str(tmp_path))
    assert find_source(f"{tmp_path}/**/*.jpg")[0].kind == "pictures"
    with pytest.raises(InputError, match="no Parquet file can be read"):
        find_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"picture": [b"x"]}, {}, r"no column 'image' or 'bytes', only picture; .*--image-column"),
        ({"image": [b"x"]}, {"image_column": "jpg"}, "no column 'jpg', only image"),
        ({"image": [b"x"]}, {"path_column": "url"}, "no column 'url', only image"),
        ({"image": ["a.jpg"]}, {}, "column 'image' is string; expected binary"),
        ({"image": pa.array([], pa.binary())}, {}, "have no rows"),
    ],
)
def test_parquet_that_is_refused(columns, options, message, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        find_source(str(tmp_path), **options)


def test_output_inside_of_the_source_is_refused(fp32_bundle, many):
    with pytest.raises(InputError, match="is inside of SOURCE"):
        run(many, many / "out", fp32_bundle)


def test_runners_that_are_refused(cluster, fp32_bundle, many, tmp_path):
    with pytest.raises(RunnerError, match="unknown runner 'onnxruntime:fp64'"):
        run(many, tmp_path / "out", fp32_bundle, runner="onnxruntime:fp64")
    with pytest.raises(BundleError, match="has no int8 image graph"):
        run(many, tmp_path / "out", fp32_bundle, runner="onnxruntime:int8")
    with pytest.raises(InputError, match=r"3 workers of 1 CPUs do not fit a cluster of 2 CPUs"):
        run(many, tmp_path / "out", fp32_bundle, resources=Resources(workers=3))


def test_a_failure_on_a_worker_ends_the_job(cluster, fp32_bundle, many, tmp_path):
    """Here a graph that is not the exported one, which only the worker looks at."""
    broken = tmp_path / "bundle"
    broken.mkdir()
    for path in fp32_bundle.path.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "image.fp32.onnx").write_bytes(b"tampered with")
    with pytest.raises(RunnerError, match=r"a worker cannot go on: .* is not the file that"):
        run(many, tmp_path / "out", Bundle.open(broken))


def test_no_cluster_at_the_address(fp32_bundle, many, tmp_path):
    line = command(many, "--out", tmp_path / "o", "--bundle", fp32_bundle.path)
    line += ["--address", "127.0.0.1:1"]
    done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no Ray cluster at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ how sources are cut


def test_shards_follow_row_groups(tmp_path):
    table = pa.table({"bytes": [b"x"] * 25})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)  # 4 4 4 4 4 4 1
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=25)
    source, rows = find_source(str(tmp_path))
    assert rows == 50
    shards = list(shards_of(source, 9))
    assert [shard.row_groups for shard in shards] == [(0, 2), (2, 4), (4, 7), (0, 1)]
    names = [name for shard in shards for name, _ in read_shard(source, shard)]
    assert names == [f"{file}.parquet#{row}" for file in "ab" for row in range(25)]


def test_a_tar_without_its_end_is_told_of(tmp_path):
    """`tarfile` itself takes it for whole."""
    path = tar_of(tmp_path / "a.tar", {"a.jpg": b"x" * 100, "b.jpg": b"y" * 100})
    path.write_bytes(path.read_bytes()[: 4 * 512])
    source, _ = find_source(str(path))
    rows = list(read_shard(source, Shard(files=("a.tar",))))
    assert [name for name, _ in rows] == ["a.tar/a.jpg", "a.tar/b.jpg", "a.tar"]
    assert "cut off or damaged after 2 pictures (no end-of-archive mark)" in str(rows[2][1])


def test_workers_keep_to_cpus_of_their_own():
    """And a CPU is free again once its worker was killed."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs 2 CPUs")
    code = (
        "import os, sys\nfrom serving.bulk.isolation import keep_to_cpus\n"
        "from serving.util.machine import cpu_count\nclaims = keep_to_cpus(1)\n"
        "print(cpu_count(), *os.sched_getaffinity(0), flush=True)\nsys.stdin.read()"
    )

    def start() -> tuple[subprocess.Popen, int]:
        pipe = subprocess.PIPE
        worker = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
        count, *cpus = map(int, worker.stdout.readline().split())
        assert count == len(cpus) == 1
        return worker, cpus[0]

    (first, cpu), (second, other) = start(), start()
    with first, second:
        assert cpu != other
        first.kill()
        first.wait()
        third, freed = start()
        with third:
            assert freed == cpu
            third.kill()
        second.kill()
