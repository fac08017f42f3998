"""Changes of an index, and builds that are killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from serving.errors import InputError
from serving.search import index as search_index
from serving.search.build import add, build, remove, update
from serving.search.index import SearchIndex
from serving.search.query import Term
from tests.support.paths import CHECKOUT
from tests.support.permissions import as_user
from tests.support.search_data import (
    BAD,
    SERVING,
    Counting,
    bundle_of,
    contents,
    fill,
    paint,
    paths,
)


def test_unreadable_files_are_named_and_skipped(photos, tmp_path, counted):
    for name, data in BAD.items():
        whole = (photos / "000.jpg").with_name("002.jpg").read_bytes()
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(whole[: len(whole) // 2] if data is None else data)
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "folder.jpg").mkdir()  # an image by its name only
    os.mkfifo(photos / "pipe.jpg")  # reading a pipe would block forever
    outcome = build(photos, tmp_path / "new", counted, chunk=8)
    told = {item.path: item.reason.lower() for item in outcome.manifest.skipped}
    assert set(told) == {*BAD, "gone.jpg", "pipe.jpg"}
    assert told["animals/text.jpg"].startswith("expected one of jpeg, png")
    assert "0 bytes" in told["empty.png"]
    assert re.search("truncated|incomplete|damaged|broken", told["zzz/cut.jpg"])
    assert told["gone.jpg"] == "is a link to a file that does not exist"
    assert told["pipe.jpg"] == "is a pipe, not a file"
    assert outcome.embedded == outcome.manifest.count == 40
    assert counted.embedded < 40 + 4 * 8  # a bad file costs its chunk at most one more attempt
    assert set(paths(tmp_path / "new")).isdisjoint(told)

    (photos / "empty.png").write_bytes((photos / "002.jpg").read_bytes())  # the file is repaired
    outcome = update(tmp_path / "new", counted)
    assert (outcome.embedded, outcome.kept) == (1, 40)
    assert "empty.png" not in {item.path for item in outcome.manifest.skipped}


def test_only_new_or_changed_images_are_embedded(photos, tmp_path, counted):
    path = tmp_path / "new"
    build(photos, path, counted)
    counted.embedded = 0
    before = contents(path)
    assert build(photos, path, counted).kept == 40
    assert contents(path) == before

    changed = photos / "002.jpg"
    paint(changed, 999)
    os.utime(changed, ns=(1, 1))
    (photos / "animals/001.png").unlink()
    fill(photos, 4, 40)
    outcome = update(path, counted)
    assert (outcome.embedded, outcome.kept, outcome.removed) == (5, 38, 1)
    assert counted.embedded == 5
    opened = SearchIndex.open(path)
    files = sorted(f for f in photos.rglob("*") if f.is_file())
    assert [opened.file(e.path) for e in opened.entries] == files
    np.testing.assert_allclose(opened.embeddings, counted.embed_images(files), atol=1e-6)
    hits = opened.find(counted, [Term(picture=changed)], 1)
    assert hits[0].path == "002.jpg"


def test_add_accepts_files_and_directories_outside_the_root(photos, index, tmp_path, counted):
    update(index, counted, photos)
    elsewhere = fill(tmp_path / "elsewhere", 3, 100)
    fill(photos, 1, 50)
    counted.embedded = 0
    outcome = add(index, [photos / "050.jpg", elsewhere, photos / "002.jpg"], counted)
    assert (outcome.embedded, outcome.kept, counted.embedded) == (4, 40, 4)
    assert {name for name in paths(index) if name.startswith("/")} == {
        str(f.resolve()) for f in elsewhere.rglob("*.*") if f.is_file()
    }
    hits = SearchIndex.open(index).find(counted, [Term(picture=elsewhere / "102.jpg")], 1)
    assert Path(hits[0].path) == elsewhere / "102.jpg"
    (elsewhere / "102.jpg").unlink()
    outcome = update(index, counted)
    assert (outcome.embedded, outcome.removed, outcome.manifest.count) == (0, 1, 43)
    with pytest.raises(InputError, match=r"no/such\.jpg: no such file"):
        add(index, [Path("no/such.jpg")], counted)


def test_moved_directory_is_not_embedded_again(photos, tmp_path, counted):
    build(photos, tmp_path / "new", counted)
    photos.rename(tmp_path / "moved")
    counted.embedded = 0
    with pytest.raises(InputError, match="is not a directory"):
        update(tmp_path / "new", counted)
    outcome = update(tmp_path / "new", counted, tmp_path / "moved")
    assert (counted.embedded, outcome.kept, outcome.removed) == (0, 40, 0)
    assert SearchIndex.open(tmp_path / "new").file("002.jpg").is_file()


def locations(index: Path) -> set[str]:
    return {item.path for item in SearchIndex.open(index).manifest.skipped}


@pytest.mark.parametrize("state", ["gone", "empty", "a file"])
def test_images_of_a_missing_directory_are_kept(photos, tmp_path, counted, state):
    """The directory may be the mount point of a disk that is not mounted."""
    index, cats = tmp_path / "new", photos / "animals" / "cats"
    build(photos, index, counted)
    counted.embedded = 0
    shutil.rmtree(cats)
    if state == "empty":
        cats.mkdir()
    elif state == "a file":
        cats.touch()
    (photos / "002.jpg").unlink()
    for change in (update(index, counted), build(photos, index, counted)):
        assert (change.manifest.count, change.embedded) == (39, 0)
        (skipped,) = change.manifest.skipped
        assert skipped.path == "animals/cats"
        assert "10 images" in skipped.reason
    assert counted.embedded == 0
    assert "002.jpg" not in paths(index)
    change = update(index, counted, remove_missing=True)
    assert (change.removed, change.manifest.count, change.manifest.skipped) == (10, 29, ())


def test_missing_directories_are_reported_once_at_the_top(photos, tmp_path, counted):
    index = tmp_path / "new"
    build(photos, index, counted)
    shutil.rmtree(photos / "animals")
    change = update(index, counted)
    assert (change.removed, change.manifest.count) == (0, 40)
    assert locations(index) == {"animals"}


def test_external_images_of_a_missing_directory_are_kept(photos, index, tmp_path, counted):
    update(index, counted, photos)
    elsewhere = fill(tmp_path / "elsewhere", 3, 100)
    add(index, [elsewhere], counted)
    shutil.rmtree(elsewhere)
    change = update(index, counted)
    assert (change.removed, change.manifest.count) == (0, 43)
    assert locations(index) == {str(elsewhere)}
    assert update(index, counted, remove_missing=True).removed == 3


def test_missing_root_keeps_the_index(photos, tmp_path, counted):
    index = tmp_path / "new"
    build(photos, index, counted)
    before = contents(index)
    shutil.rmtree(photos)
    for _ in range(2):  # gone, then empty
        with pytest.raises(InputError):
            update(index, counted)
        with pytest.raises(InputError):
            update(index, counted, remove_missing=True)
        photos.mkdir(exist_ok=True)
    assert contents(index) == before


def test_changed_file_that_cannot_be_read_keeps_its_embedding(photos, tmp_path, counted):
    index, changed = tmp_path / "new", photos / "002.jpg"
    build(photos, index, counted)
    before = changed.read_bytes()
    changed.write_bytes(before[:100])  # half a copy
    change = update(index, counted)
    assert (change.removed, change.manifest.count) == (0, 40)
    assert locations(index) == {"002.jpg"}
    changed.unlink()
    os.mkfifo(changed)
    change = update(index, counted)
    assert (change.removed, change.manifest.count) == (0, 40)
    assert locations(index) == {"002.jpg"}
    changed.unlink()
    paint(changed, 555)
    change = update(index, counted)
    assert (change.embedded, change.removed, change.manifest.skipped) == (1, 0, ())


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_images_of_an_unreadable_directory_are_kept(photos, tmp_path, fp32_bundle, clip, mode):
    """With mode 444 the files can be listed, but not accessed."""
    index, cats = tmp_path / "new", photos / "animals" / "cats"
    build(photos, index, clip)
    local = (*bundle_of(fp32_bundle), "--runner", "onnxruntime:fp32")
    cats.chmod(mode)
    try:
        command = [*as_user(), *SERVING, "update", str(index), *local, "--json"]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    finally:
        cats.chmod(0o755)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["images"], told["removed"], told["kept"]) == (40, 0, 40)
    assert told["skipped"]
    assert all(item["path"].startswith("animals/cats") for item in told["skipped"])


def test_exact_paths_win_over_globs(photos, tmp_path, counted):
    for number, name in enumerate(("img[1].jpg", "img1.jpg", "img2.jpg")):
        paint(photos / name, 700 + number)
    index = tmp_path / "new"
    build(photos, index, counted)
    opened = SearchIndex.open(index)

    def matching(*globs):
        return [opened.entries[row].path for row in opened.matching(globs)]

    assert matching("img[1].jpg") == ["img[1].jpg"]
    assert matching("img[12].jpg") == ["img1.jpg", "img2.jpg"]
    assert matching("img[1].jpg", "img[12].jpg") == ["img1.jpg", "img2.jpg", "img[1].jpg"]
    remove(index, ["img[1].jpg"])
    assert {"img1.jpg", "img2.jpg"} <= set(paths(index))
    assert "img[1].jpg" not in paths(index)


def test_remove_accepts_paths_and_globs(index, clip):
    outcome = remove(index, ["002.jpg", "animals/cats/*"])
    assert (outcome.removed, outcome.kept, outcome.manifest.count) == (11, 29, 29)
    left = SearchIndex.open(index)
    assert not any(e.path == "002.jpg" or "cats" in e.path for e in left.entries)
    files = [left.file(entry.path) for entry in left.entries]
    np.testing.assert_allclose(left.embeddings, clip.embed_images(files), atol=1e-6)
    before = contents(index)
    for globs, message in (
        (["002.jpg"], "no path in the index matches '002.jpg'"),
        (["zoo/*", "nothing*"], r"matches 'nothing\*'"),
        (["*"], "would remove all 29 images; delete"),
    ):
        with pytest.raises(InputError, match=message):
            remove(index, globs)
    assert contents(index) == before


def test_file_names_that_are_not_utf8_are_kept(tmp_path, clip, counted):
    photos = fill(tmp_path / "photos", 4)
    odd = os.fsdecode(b"caf\xe9\nline.jpg")
    paint(photos / "x.jpg", 77)
    (photos / "x.jpg").rename(photos / odd)
    build(photos, tmp_path / "new", counted, chunk=2)
    hits = SearchIndex.open(tmp_path / "new").find(clip, [Term(picture=photos / odd)], 1)
    assert hits[0].path == odd
    assert update(tmp_path / "new", counted).embedded == 0


def test_index_replaced_during_open_is_read_again(index, monkeypatch):
    plain, left = search_index.verify, [["animals/cats/*"]]

    def replaced_before(*arguments):
        if left:
            remove(index, left.pop())
        plain(*arguments)

    monkeypatch.setattr(search_index, "verify", replaced_before)
    assert len(SearchIndex.open(index).entries) == 30
    assert not left


def test_killed_build_resumes(tmp_path, fp32_bundle, clip, counted):
    """The command is killed by SIGKILL after it has written the first of three chunks."""
    photos, path = fill(tmp_path / "photos", 600), tmp_path / "new"
    local = (*bundle_of(fp32_bundle), "--runner", "onnxruntime:fp32")  # as `clip` does
    command = (*SERVING, "build", str(photos), "--output", str(path), *local)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    first = path / "pending" / "000001.npz"
    while not first.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors

    with pytest.raises(InputError, match=r"holds an unfinished index; .* command again to finish"):
        SearchIndex.open(path)
    chunks = len(list((path / "pending").glob("*.npz")))
    assert 1 <= chunks < 3
    outcome = build(photos, path, counted)
    assert (outcome.resumed, outcome.embedded) == (256 * chunks, 600 - 256 * chunks)
    assert counted.embedded == 600 - 256 * chunks
    assert {item.name for item in path.iterdir()} == {"manifest.json", "generation-1", ".lock"}

    index = SearchIndex.open(path)
    build(photos, tmp_path / "straight", clip)
    straight = SearchIndex.open(tmp_path / "straight")
    assert index.entries == straight.entries
    np.testing.assert_allclose(index.embeddings, straight.embeddings, atol=1e-6)
    last = "zoo/über [x] 599.png"
    assert index.find(clip, [Term(picture=photos / last)], 1)[0].path == last


class Failing(Counting):
    """An embedder whose server disappears after some images."""

    last = 16

    def embed_images(self, images):
        if self.embedded >= self.last:
            raise ConnectionError("gone")
        return super().embed_images(images)


@pytest.fixture
def half_built(folder, tmp_path, fp32_bundle) -> Path:
    """An unfinished index: two chunks of 8 images."""
    with Failing(fp32_bundle.path) as failing, pytest.raises(ConnectionError):
        build(folder, tmp_path / "half", failing, chunk=8)
    return tmp_path / "half"


def test_a_damaged_chunk_is_embedded_again(half_built, folder, built, counted):
    chunk = half_built / "pending" / "000002.npz"
    chunk.write_bytes(chunk.read_bytes()[:-40])
    outcome = build(folder, half_built, counted, chunk=8)
    assert (outcome.resumed, outcome.embedded, counted.embedded) == (8, 32, 32)
    a, b = SearchIndex.open(half_built), SearchIndex.open(built)
    np.testing.assert_allclose(a.embeddings, b.embeddings, atol=1e-6)


def test_file_changed_since_its_chunk_is_embedded_again(photos, tmp_path, fp32_bundle, counted):
    with Failing(fp32_bundle.path) as failing, pytest.raises(ConnectionError):
        build(photos, tmp_path / "half", failing, chunk=8)
    paint(photos / "animals" / "001.png", 888)
    outcome = build(photos, tmp_path / "half", counted, chunk=8)
    assert (outcome.resumed, outcome.embedded) == (15, 25)
    opened = SearchIndex.open(tmp_path / "half")
    files = [opened.file(entry.path) for entry in opened.entries]
    np.testing.assert_allclose(opened.embeddings, counted.embed_images(files), atol=1e-6)


def test_unfinished_index_of_another_build_is_unchanged(half_built, folder, photos, other, clip):
    before = contents(half_built)
    with pytest.raises(InputError, match=r"built with tiny-clip .* this is other-clip \(32 dimen"):
        build(folder, half_built, other)
    with pytest.raises(InputError, match=r"an unfinished index of .*photos\d, not of .*/photos;"):
        build(photos, half_built, clip)
    assert contents(half_built) == before


def test_killed_change_is_atomic(index, folder, clip, tmp_path):
    """Kills an addition and a removal at every file operation and at random times. See the
    script."""
    elsewhere = fill(tmp_path / "elsewhere", 6, 200)
    files = [f for root in (folder, elsewhere) for f in sorted(root.rglob("*.*")) if f.is_file()]
    table = tmp_path / "table.npz"
    np.savez(table, names=list(map(str, files)), embeddings=clip.embed_images(files))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the script forks
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_changes", index, table],
        cwd=CHECKOUT,
        env=os.environ | threads | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert min(told["add"], told["remove"]) > 15, told  # operations that were killed
    assert told["random"] == 20
