"""Search against brute force; indexes that are killed, damaged, foreign; the commands; a server."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from serving.bundles.bundle import Bundle
from serving.cli.search import app
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import ImageError, InputError, MissingPackageError, TextError
from serving.search import index as search_index
from serving.search.build import add, build, remove, update
from serving.search.faiss_index import TARGET, make, search
from serving.search.index import Hit, SearchIndex
from serving.search.query import Term, query_vector
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.paths import CHECKOUT

BAD = {
    "animals/text.jpg": b"this is a text file, renamed .jpg",
    "empty.png": b"",
    "zzz/cut.jpg": None,  # a picture's first half
}
SERVING = (sys.executable, "-m", "serving", "search")
QUERIES = ("a cat", "two dogs on a bench", "the colour red", "Ünïcödé")


def paint(file: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    file.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((48, 40), Image.Resampling.BICUBIC).save(file)


def fill(folder: Path, count: int, first: int = 0) -> Path:
    names = ("animals/cats/{}.jpg", "animals/{}.png", "{}.jpg", "zoo/über [x] {}.png")
    for number in range(first, first + count):
        paint(folder / names[number % 4].format(f"{number:03d}"), number)
    return folder


def bundle_of(bundle: Bundle) -> tuple[str, str]:
    return "--bundle", str(bundle.path)


class Counting(LocalClip):
    """Counts the pictures that it embedded."""

    embedded = 0

    def embed_images(self, images):
        embeddings = super().embed_images(images)
        self.embedded += len(embeddings)
        return embeddings


@pytest.fixture(scope="module")
def clip(fp32_bundle):
    with Counting(fp32_bundle.path) as opened:
        yield opened


@pytest.fixture
def counted(clip):
    clip.embedded = 0
    return clip


@pytest.fixture(scope="module")
def other(fp32_bundle, tmp_path_factory):
    """A bundle that says it has other weights."""
    path = tmp_path_factory.mktemp("other") / "other-clip"
    shutil.copytree(fp32_bundle.path, path)
    manifest = fp32_bundle.manifest
    provenance = replace(manifest.provenance, weights_sha256="f" * 64)
    changed = replace(manifest, name="other-clip", provenance=provenance)
    (path / "manifest.json").write_text(changed.to_json())
    with LocalClip(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 pictures and three files that are none; do not change it."""
    return fill(tmp_path_factory.mktemp("photos"), 40)


@pytest.fixture(scope="module")
def built(folder, clip, tmp_path_factory) -> Path:
    """The exact index of `folder`; do not change it."""
    path = tmp_path_factory.mktemp("indexes") / "photos.index"
    build(folder, path, clip)
    return path


@pytest.fixture
def index(built, tmp_path) -> Path:
    """A copy of `built` to change."""
    return Path(shutil.copytree(built, tmp_path / "copy.index"))


@pytest.fixture
def photos(folder, tmp_path) -> Path:
    """A copy of `folder` to change."""
    return Path(shutil.copytree(folder, tmp_path / "photos"))


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def paths(path: Path) -> list[str]:
    return [entry.path for entry in SearchIndex.open(path).entries]


def top(cosines, names, count) -> list[Hit]:
    """Brute force, one pair at a time."""
    pairs = sorted(zip(-np.asarray(cosines, np.float64), names, strict=True))
    return [Hit(name, -value) for value, name in pairs[:count]]


def same(hits, expected) -> bool:
    assert [hit.path for hit in hits] == [hit.path for hit in expected]
    cosines = [[hit.cosine for hit in side] for side in (hits, expected)]
    np.testing.assert_allclose(*cosines, atol=1e-5)
    return True


# ------------------------------------------------------------------ what is found


def test_an_index_holds_the_embeddings_of_the_folder(folder, built, clip):
    index = SearchIndex.open(built)
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    assert [index.file(e.path) for e in index.entries] == files
    assert index.entries[0].bytes == files[0].stat().st_size
    np.testing.assert_allclose(index.embeddings, clip.embed_images(files), atol=1e-6)
    stored = faiss.read_index(str(built / index.manifest.index.name))
    assert type(stored) is faiss.IndexFlatIP
    assert index.manifest.count == stored.ntotal == 40
    assert index.manifest.model == clip.identity
    assert index.manifest.layout.recall_at_10 is None
    assert {item.name for item in built.iterdir()} == {"manifest.json", "generation-1", ".lock"}


def test_texts_and_pictures_find_what_brute_force_finds(folder, built, clip):
    index = SearchIndex.open(built)
    files = [index.file(entry.path) for entry in index.entries]
    names, embeddings = [e.path for e in index.entries], clip.embed_images(files)
    for text in QUERIES:
        expected = top(embeddings @ clip.embed_texts([text])[0], names, 7)
        assert same(index.find(clip, [Term(text=text)], 7), expected)
    for row in (0, 13, 39):
        hits = index.find(clip, [Term(picture=files[row])], 5)
        assert same(hits, top(embeddings @ embeddings[row], names, 5))
        assert (hits[0].path, round(hits[0].cosine, 4)) == (names[row], 1)


def test_combined_and_negative_queries(folder, built, clip):
    index, file = SearchIndex.open(built), folder / "002.jpg"
    cat, red = clip.embed_texts(["a cat", "red"])
    picture = clip.embed_images([file])[0]
    terms = [
        Term(text="a cat", weight=2),
        Term(picture=file, weight=0.5),
        Term(text="red", weight=-0.7),
    ]
    direction = 2 * cat + 0.5 * picture - 0.7 * red
    direction /= np.linalg.norm(direction)
    np.testing.assert_allclose(query_vector(clip, terms), direction, atol=1e-5)
    names = [entry.path for entry in index.entries]
    expected = top(index.embeddings @ direction, names, 10)
    assert same(index.find(clip, terms), expected)
    without = index.find(clip, [terms[0], terms[1]])
    assert [h.path for h in without] != [h.path for h in expected]  # the negative term counts


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivf"])
def test_globs_leave_the_nearest_of_what_fits(built, index, folder, clip, kind):
    build(folder, index, clip, kind)
    opened, (query,) = SearchIndex.open(index), clip.embed_texts(["a cat"])
    cosines = opened.embeddings @ query
    for globs, pattern in (
        (["animals/*"], r"animals/"),  # with what is in its folders
        (["*.png", "zoo/*"], r".*\.png|zoo/"),
        (["zoo/über [[]x] *"], r"zoo/"),
        (["animals/cats/00?.jpg"], r"animals/cats/00.\.jpg"),
    ):
        kept = [row for row, e in enumerate(opened.entries) if re.match(pattern, e.path)]
        assert 0 < len(kept) < 40
        names = [opened.entries[row].path for row in kept]
        hits = opened.find(clip, [Term(text="a cat")], 40, globs)  # fewer come: those that fit
        assert same(hits, top(cosines[kept], names, 40))
    with pytest.raises(InputError, match=r"no picture of the index fits 'animal/\*'; paths are su"):
        opened.find(clip, [Term(text="a cat")], 5, ["animal/*"])


def test_blocks_of_a_filtered_search_are_merged(built, clip, monkeypatch):
    monkeypatch.setattr(search_index, "_BLOCK", 7)
    opened, queries = SearchIndex.open(built), clip.embed_texts(list(QUERIES))
    rows, cosines = opened.search(queries, 9, ["*"])
    expected = np.argsort(-(queries @ opened.embeddings.T), axis=1)[:, :9]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(cosines, opened.search(queries, 9)[1], atol=1e-6)


# ------------------------------------------------------------------ kinds


@pytest.fixture(scope="module")
def clustered():
    """4,000 unit vectors in 60 clusters, float32 [4000, 32], and 300 more of the same kind."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(60, 32))
    x = centres[rng.integers(0, 60, 4300)] + 0.7 * rng.normal(size=(4300, 32))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return x[:4000], x[4000:]


@pytest.mark.parametrize(
    ("kind", "name"), [("hnsw", faiss.IndexHNSWFlat), ("ivf", faiss.IndexIVFFlat)]
)
def test_recall_is_what_brute_force_finds_it_to_be(clustered, kind, name):
    embeddings, queries = clustered
    index, layout = make(kind, embeddings)
    assert type(index) is name
    _, rows = search(index, layout, queries, 10)
    exact = np.argsort(-(queries @ embeddings.T), axis=1)[:, :10]
    found = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), exact.tolist(), strict=True)]
    assert layout.recall_queries == 500
    assert TARGET - 0.03 <= layout.recall_at_10 <= 1
    assert abs(np.mean(found) / 10 - layout.recall_at_10) < 0.05
    narrow = {"hnsw": "width", "ivf": "probes"}[kind]
    least = replace(layout, parameters=layout.parameters | {narrow: 1})
    _, fewer = search(index, least, queries, 10)
    missed = [len(set(a) & set(b)) for a, b in zip(fewer.tolist(), exact.tolist(), strict=True)]
    assert np.mean(missed) < np.mean(found) - 0.2  # the tuning is what reaches it


def test_a_change_of_kind_embeds_nothing(index, folder, counted):
    before = SearchIndex.open(index)
    outcome = build(folder, index, counted, "ivf")
    assert (counted.embedded, outcome.embedded, outcome.kept) == (0, 0, 40)
    after = SearchIndex.open(index)
    assert after.manifest.layout.kind == "ivf"
    assert after.manifest.layout.recall_at_10 >= TARGET
    np.testing.assert_array_equal(after.embeddings, before.embeddings)
    build(folder, index, counted)
    assert SearchIndex.open(index).manifest.layout.kind == "ivf"  # kept when none is named
    assert build(folder, index, counted, "exact").manifest.layout.recall_at_10 is None


def test_a_kind_that_met_too_few_is_completed(clustered, clip, index):
    """IVF that looks into one cell finds fewer than all; all are asked for."""
    embeddings, queries = clustered
    made, layout = make("ivf", embeddings)
    least = replace(layout, parameters=layout.parameters | {"probes": 1})
    assert (search(made, least, queries, 4000)[1] < 0).any()
    opened = SearchIndex.open(index)
    manifest = replace(opened.manifest, layout=least)
    whole = SearchIndex(index, manifest, opened.entries * 100, embeddings, made)
    rows, cosines = whole.search(queries[:2], 4000)
    assert [sorted(row) for row in rows.tolist()] == [list(range(4000))] * 2
    assert (np.diff(cosines, axis=1) <= 0).all()


# ------------------------------------------------------------------ changes


def test_unreadable_files_are_named_and_skipped(photos, tmp_path, counted):
    for name, data in BAD.items():
        whole = (photos / "000.jpg").with_name("002.jpg").read_bytes()
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(whole[: len(whole) // 2] if data is None else data)
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "folder.jpg").mkdir()
    outcome = build(photos, tmp_path / "new", counted, chunk=8)
    told = {item.path: item.reason for item in outcome.manifest.skipped}
    assert set(told) == {*BAD, "gone.jpg", "folder.jpg"}
    assert told["animals/text.jpg"].startswith("expected one of JPEG, PNG")
    assert "0 bytes" in told["empty.png"]
    assert re.search("truncated|incomplete|damaged|broken", told["zzz/cut.jpg"])
    assert "No such file" in told["gone.jpg"]
    assert "is a directory" in told["folder.jpg"]
    assert outcome.embedded == outcome.manifest.count == 40
    assert counted.embedded < 40 + 5 * 8  # a bad file costs its chunk at most once more
    assert set(paths(tmp_path / "new")).isdisjoint(told)

    (photos / "empty.png").write_bytes((photos / "002.jpg").read_bytes())  # repaired
    outcome = update(tmp_path / "new", counted)
    assert (outcome.embedded, outcome.kept) == (1, 40)
    assert "empty.png" not in {item.path for item in outcome.manifest.skipped}


def test_only_what_is_new_or_changed_is_embedded(photos, tmp_path, counted):
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


def test_add_takes_files_and_folders_also_from_elsewhere(photos, index, tmp_path, counted):
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
    with pytest.raises(InputError, match=r"no/such\.jpg: no such file or folder"):
        add(index, [Path("no/such.jpg")], counted)


def test_a_folder_that_moved_is_not_embedded_again(photos, tmp_path, counted):
    build(photos, tmp_path / "new", counted)
    photos.rename(tmp_path / "moved")
    counted.embedded = 0
    with pytest.raises(InputError, match="is no folder"):
        update(tmp_path / "new", counted)
    outcome = update(tmp_path / "new", counted, tmp_path / "moved")
    assert (counted.embedded, outcome.kept, outcome.removed) == (0, 40, 0)
    assert SearchIndex.open(tmp_path / "new").file("002.jpg").is_file()


def test_remove_by_path_and_glob(index, clip):
    outcome = remove(index, ["002.jpg", "animals/cats/*"])
    assert (outcome.removed, outcome.kept, outcome.manifest.count) == (11, 29, 29)
    left = SearchIndex.open(index)
    assert not any(e.path == "002.jpg" or "cats" in e.path for e in left.entries)
    files = [left.file(entry.path) for entry in left.entries]
    np.testing.assert_allclose(left.embeddings, clip.embed_images(files), atol=1e-6)
    before = contents(index)
    for globs, message in (
        (["002.jpg"], "no picture of the index fits '002.jpg'"),
        (["zoo/*", "nothing*"], r"fits 'nothing\*'"),
        (["*"], "would take out all 29 pictures; delete"),
    ):
        with pytest.raises(InputError, match=message):
            remove(index, globs)
    assert contents(index) == before


def test_names_that_are_no_utf8_survive(tmp_path, clip, counted):
    photos = fill(tmp_path / "photos", 4)
    odd = os.fsdecode(b"caf\xe9\nline.jpg")
    paint(photos / "x.jpg", 77)
    (photos / "x.jpg").rename(photos / odd)
    build(photos, tmp_path / "new", counted, chunk=2)
    hits = SearchIndex.open(tmp_path / "new").find(clip, [Term(picture=photos / odd)], 1)
    assert hits[0].path == odd
    assert update(tmp_path / "new", counted).embedded == 0


def test_a_reader_meets_an_index_that_is_replaced_meanwhile(index, monkeypatch):
    plain, left = search_index.verify, [["animals/cats/*"]]

    def replaced_before(*arguments):
        if left:
            remove(index, left.pop())
        plain(*arguments)

    monkeypatch.setattr(search_index, "verify", replaced_before)
    assert len(SearchIndex.open(index).entries) == 30
    assert not left


# ------------------------------------------------------------------ killed


def test_a_killed_build_goes_on_where_it_was(tmp_path, fp32_bundle, clip, counted):
    """The command, killed for good when it has written the first of three chunks."""
    photos, path = fill(tmp_path / "photos", 600), tmp_path / "new"
    command = (*SERVING, "build", str(photos), "--index", str(path), *bundle_of(fp32_bundle))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    first = path / "pending" / "000001.npz"
    while not first.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors

    with pytest.raises(InputError, match=r"is the beginning of an index; .* goes on when it is"):
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
    """Its server goes away after some pictures."""

    last = 16

    def embed_images(self, images):
        if self.embedded >= self.last:
            raise ConnectionError("gone")
        return super().embed_images(images)


@pytest.fixture
def half_built(folder, tmp_path, fp32_bundle) -> Path:
    """The beginning of an index: two chunks of 8."""
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


def test_a_file_that_changed_since_its_chunk_is_embedded_again(
    photos, tmp_path, fp32_bundle, counted
):
    with Failing(fp32_bundle.path) as failing, pytest.raises(ConnectionError):
        build(photos, tmp_path / "half", failing, chunk=8)
    paint(photos / "animals" / "001.png", 888)
    outcome = build(photos, tmp_path / "half", counted, chunk=8)
    assert (outcome.resumed, outcome.embedded) == (15, 25)
    opened = SearchIndex.open(tmp_path / "half")
    files = [opened.file(entry.path) for entry in opened.entries]
    np.testing.assert_allclose(opened.embeddings, counted.embed_images(files), atol=1e-6)


def test_the_beginning_of_another_index_is_left_alone(half_built, folder, photos, other, clip):
    before = contents(half_built)
    with pytest.raises(InputError, match=r"made with tiny-clip .* this is other-clip \(32 dimens"):
        build(folder, half_built, other)
    with pytest.raises(InputError, match=r"beginning of an index of .*photos0, not of .*/photos;"):
        build(photos, half_built, clip)
    assert contents(half_built) == before


def test_killed_at_any_moment_a_change_has_happened_or_not(index, folder, clip, tmp_path):
    """At every file operation of an addition and of a removal, and at random; see the script."""
    elsewhere = fill(tmp_path / "elsewhere", 6, 200)
    files = [f for root in (folder, elsewhere) for f in sorted(root.rglob("*.*")) if f.is_file()]
    table = tmp_path / "table.npz"
    np.savez(table, names=list(map(str, files)), embeddings=clip.embed_images(files))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # it forks
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_changes", index, table],
        cwd=CHECKOUT,
        env=os.environ | threads | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert min(told["add"], told["remove"]) > 15, told  # operations it was killed at
    assert told["random"] == 20


# ------------------------------------------------------------------ what cannot be used


def test_another_models_index_is_refused(index, photos, folder, other):
    before = contents(index)
    told = (
        r"with tiny-clip \(32 dimensions, weights [0-9a-f]{12}\.\.\.\), this is other-clip \(32 d"
    )
    with pytest.raises(InputError, match=told):
        SearchIndex.open(index).find(other, [Term(text="a cat")])
    for change in (
        lambda: build(folder, index, other),
        lambda: update(index, other, photos),
        lambda: add(index, [photos / "002.jpg"], other),
    ):
        with pytest.raises(InputError, match=told + ".*cannot be compared; use that model, or bu"):
            change()
    assert contents(index) == before


def test_another_dimension_is_another_model(built, clip):
    identity = replace(clip.identity, embed_dim=64)
    with pytest.raises(InputError, match=r"\(32 dimensions, .* this is tiny-clip \(64 dimensions"):
        SearchIndex.open(built).check(identity)
    with pytest.raises(InputError, match=r"queries are \[1, 64\], expected \[q, 32\]"):
        SearchIndex.open(built).search(np.zeros((1, 64), np.float32), 3)


def flip(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


DAMAGE = {"changed": flip, "truncated": lambda data: data[: len(data) // 2], "empty": lambda _: b""}


@pytest.mark.parametrize("name", ["index.faiss", "embeddings.npy", "paths.jsonl"])
@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
def test_damaged_files_are_named_before_they_are_read(
    index, folder, clip, name, damage, monkeypatch
):
    file = index / "generation-1" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("read before it was checked"))
    before = contents(index)
    state = "missing" if damage == "missing" else r"damaged: \d+ bytes with sha256 [0-9a-f]{16}"
    told = rf"generation-1/{name} is {state}.*restore .* or delete it .*search build {folder} --in"
    for use in (
        lambda: SearchIndex.open(index),
        lambda: build(folder, index, clip),
        lambda: remove(index, ["*.png"]),
    ):
        with pytest.raises(InputError, match=told):
            use()
    assert contents(index) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"manifest\.json is damaged: Expecting .*; restore .* from a copy, or delete it"),
        ('{"format": 3}', "format 3, expected 'clip search index 1'; it is no search index"),
        ("[]", "format None, expected"),
        ('{"format": "clip search index 1"}', "is damaged: count: missing"),
    ],
)
def test_a_damaged_or_foreign_manifest(index, folder, clip, text, message):
    (index / "manifest.json").write_text(text)
    before = contents(index)
    for use in (lambda: SearchIndex.open(index), lambda: build(folder, index, clip)):
        with pytest.raises(InputError, match=message):
            use()
    assert contents(index) == before


def test_a_manifest_names_its_own_files_only(index):
    file = index / "manifest.json"
    file.write_text(file.read_text().replace("generation-1/paths.jsonl", "../paths.jsonl"))
    with pytest.raises(
        InputError, match=r"damaged: expected the files generation-1/index\.faiss, g"
    ):
        SearchIndex.open(index)


def test_a_place_that_cannot_be_written(folder, clip):
    with pytest.raises(InputError, match="/proc/index cannot be written"):
        build(folder, Path("/proc/index"), clip)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, folder, clip, fp32_bundle):
    holiday = fill(tmp_path / "holiday", 2)
    half = tmp_path / "pending-of-others"
    (half / "pending").mkdir(parents=True)
    file = tmp_path / "file"
    file.write_text("x")
    for path, message in (
        (holiday, "holds other things, such as .*, which are left alone; give another folder"),
        (half, "holds other things, such as pending"),
        (fp32_bundle.path, "format 2, expected 'clip search index 1'; it is no search index"),
        (file, "is a file; expected the name of a folder"),
    ):
        before = contents(path)
        with pytest.raises(InputError, match=message):
            build(folder, path, clip)
        assert contents(path) == before
    with pytest.raises(InputError, match=r"is no search index: no manifest\.json in it; make one"):
        SearchIndex.open(holiday)


def test_folders_without_a_readable_picture(tmp_path, index, clip):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no picture")
    before = contents(index)
    for path in (tmp_path / "new", index):
        with pytest.raises(InputError, match=r"no pictures in .*empty; expected files of .jpg"):
            build(tmp_path / "empty", path, clip)
    assert not (tmp_path / "new").exists()
    with pytest.raises(
        InputError, match=r"none of the 1 pictures can be read; the first, a\.jpg: e"
    ):
        build(tmp_path / "bad", tmp_path / "new", clip)
    for nothing in (tmp_path / "empty", tmp_path / "bad"):
        with pytest.raises(InputError, match=r"no pictures in|none of the 1 pictures can be read"):
            update(index, clip, nothing)
    assert contents(index) == before


def test_another_folders_index_is_left_alone(index, photos, clip):
    before = contents(index)
    with pytest.raises(InputError, match=r"holds the pictures of .*, not of .*/photos; give anot"):
        build(photos, index, clip)
    assert contents(index) == before


def test_one_writer_at_a_time(index, folder, clip):
    with (index / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for change in (lambda: remove(index, ["*.png"]), lambda: build(folder, index, clip)):
            with pytest.raises(InputError, match=r"another process changes .* at the moment"):
                change()
    assert len(SearchIndex.open(index).entries) == 40


def test_queries_that_cannot_be_used(built, folder, clip):
    opened, file = SearchIndex.open(built), folder / "002.jpg"
    for terms, top, error, message in (
        ([], 5, InputError, "nothing to look for; give at least one text or picture"),
        ([Term(text="a", weight=-1)], 5, InputError, "nothing to look for"),
        ([Term(text="a", weight=0)], 5, InputError, "a weight of 0 says nothing"),
        ([Term(text="a", weight=float("nan"))], 5, InputError, "a weight of nan"),
        ([Term()], 5, InputError, "either a text or a picture"),
        ([Term(text="a", picture=file)], 5, InputError, "either a text or a picture"),
        ([Term(text="a"), Term(text="a", weight=-1)], 5, InputError, "cancel each other out"),
        ([Term(text="word " * 500)], 5, TextError, "502 tokens, .* more than the model's 77"),
        ([Term(text=" ")], 5, TextError, "empty or only whitespace"),
        ([Term(picture=folder / "no.jpg")], 5, ImageError, r"no\.jpg: no such file"),
        ([Term(text="a")], 41, InputError, "asked for 41 hits, .* holds 40 pictures; ask for 1 t"),
        ([Term(text="a")], 0, InputError, "asked for 0 hits"),
    ):
        with pytest.raises(error, match=message):
            opened.find(clip, terms, top)
    cut = opened.find(clip, [Term(text="word " * 500)], 5, truncate=True)
    assert cut == opened.find(clip, [Term(text="word " * 75)], 5)


def test_without_faiss_it_says_what_to_install(built, folder, tmp_path, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for use in (lambda: SearchIndex.open(built), lambda: build(folder, tmp_path / "new", clip)):
        with pytest.raises(
            MissingPackageError, match=r"needs faiss.*pip install 'clip-deploy\[search\]'"
        ):
            use()
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------ commands


def run(*arguments: object) -> str:
    """A command that succeeds; what it printed on standard output."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_commands(photos, tmp_path, fp32_bundle, clip):
    path, bundle = tmp_path / "photos.index", bundle_of(fp32_bundle)
    (photos / "bad.jpg").write_bytes(b"no picture")
    told = json.loads(run("build", photos, "--index", path, *bundle, "--json").splitlines()[-1])
    assert (told["pictures"], told["embedded"], told["layout"]["kind"]) == (40, 40, "exact")
    assert [item["path"] for item in told["skipped"]] == ["bad.jpg"]
    told = run("build", photos, "--index", path, "--kind", "hnsw", *bundle)
    assert re.search(r"40 pictures, hnsw with links 32.*recall@10 1\.000 by 20 queries", told)

    sheet, image = tmp_path / "sheet.png", photos / "002.jpg"
    query = ("query", path, "a cat", "red", "--image", image, "--not", "a dog", *bundle)
    query += ("--weight", 1, "--weight", 0.5, "--weight", 0.25, "--weight", 0.5)
    told = json.loads(run(*query, "--top", 7, "--sheet", sheet, "--json").splitlines()[-1])
    terms = [
        Term(text="a cat"),
        Term(text="red", weight=0.5),
        Term(picture=image, weight=0.25),
        Term(text="a dog", weight=-0.5),
    ]
    expected = SearchIndex.open(path).find(clip, terms, 7)
    assert [hit["path"] for hit in told["hits"]] == [hit.path for hit in expected]
    np.testing.assert_allclose(
        [hit["cosine"] for hit in told["hits"]], [h.cosine for h in expected], atol=1e-5
    )
    assert Path(told["hits"][0]["file"]).is_file()
    assert told["query"] == "a cat + 0.5 red + 0.25 002.jpg - 0.5 a dog"
    with Image.open(sheet) as drawn:
        assert drawn.width > 5 * 160
        assert drawn.height > 3 * 160  # the picture looked for, and two rows
        pixels = np.asarray(drawn.convert("RGB").crop((12, 84, 172, 244)), np.int16)
    with Image.open(image) as picture:
        shown = np.asarray(picture.convert("RGB").resize((8, 8), Image.Resampling.BOX), np.int16)
    small = np.asarray(
        Image.fromarray(pixels.astype(np.uint8)).resize((8, 8), Image.Resampling.BOX)
    )
    assert np.abs(small - shown)[:, 2:6].mean() < 30  # it is drawn there

    table = run("query", path, "a cat", "--glob", "animals/*", *bundle)
    rows = re.findall(r"│ +(\d+) │ +(-?\d\.\d{3}) │ (\S.*?) +│", table)
    assert [row[0] for row in rows] == list(map(str, range(1, 11)))
    assert all(row[2].startswith("animals/") for row in rows)

    told = run("query", path, "a cat", "--not", "a dog", "--not-image", image, *bundle)
    assert "a cat - 0.25 a dog - 0.25 002.jpg" in told
    expected = [
        Term(text="a cat"),
        Term(text="a dog", weight=-0.25),
        Term(picture=image, weight=-0.25),
    ]
    assert SearchIndex.open(path).find(clip, expected, 1)[0].path in told

    fill(photos, 2, 60)
    told = run("add", path, photos / "animals" / "061.png", *bundle)
    assert "41 pictures" in told
    assert "(1 embedded, 40 kept, 1 skipped)" in told
    assert "(1 embedded, 41 kept, 1 skipped)" in run("update", path, *bundle)
    assert "32 pictures" in run("remove", path, "zoo/*")
    told = json.loads(run("info", path, "--json"))
    assert told["count"] == len(paths(path))
    assert told["model"]["weights_sha256"] == fp32_bundle.manifest.provenance.weights_sha256
    assert "hnsw with links 32" in run("info", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("query", "INDEX", "word " * 500), "502 tokens.*77.*shorten it or give --truncate"),
        (("query", "INDEX"), "nothing to look for; give a text, such as 'a red circle', or --im"),
        (("query", "INDEX", "--not", "a cat"), "nothing to look for"),
        (("query", "INDEX", "a cat", "--top", "41"), "asked for 41 hits, .* holds 40 pictures"),
        (("query", "INDEX", "a", "b", "--weight", "1"), "1 weights for 2 terms; give one --weight"),
        (("query", "nowhere", "a cat"), "nowhere is no search index"),
        (("info", "nowhere"), "nowhere is no search index"),
    ],
)
def test_command_errors_are_one_message(built, fp32_bundle, arguments, message):
    arguments = [str(built) if a == "INDEX" else a for a in arguments]
    bundle = [] if arguments[0] == "info" else bundle_of(fp32_bundle)
    before = contents(built)
    done = CliRunner().invoke(app, [*arguments, *bundle])
    assert isinstance(done.exception, InputError)
    assert re.search(message, str(done.exception))
    assert contents(built) == before


def test_an_error_of_a_command_is_one_line(built, fp32_bundle):
    command = (*SERVING, "query", str(built), "a", "--top", "41", *bundle_of(fp32_bundle))
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: asked for 41 hits, .* ask for 1 to 40\n", done.stderr)


def test_a_few_pictures_and_files_that_are_gone(tmp_path, fp32_bundle):
    photos, path = fill(tmp_path / "photos", 3), tmp_path / "few.index"
    bundle, sheet = bundle_of(fp32_bundle), tmp_path / "sheet.png"
    run("build", photos, "--index", path, *bundle)
    assert len(re.findall(r"│ +\d+ │", run("query", path, "a cat", *bundle))) == 3  # not 10
    (photos / "002.jpg").unlink()
    title = "a very long query about something that is told in many words"
    done = CliRunner().invoke(app, ["query", str(path), title, "--sheet", str(sheet), *bundle])
    assert done.exit_code == 0
    assert re.search(r"not on the sheet: .*002\.jpg: no such file", done.stderr)
    with Image.open(sheet) as drawn:
        assert drawn.width > 500  # as wide as its title


def test_help_loads_no_faiss():
    code = "import sys, serving.__main__; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0


# ------------------------------------------------------------------ a server


def test_the_same_by_a_server(fp32_bundle, photos, built, clip, tmp_path):
    (photos / "animals" / "text.jpg").write_bytes(BAD["animals/text.jpg"])
    repository, path = tmp_path / "repository", tmp_path / "served.index"
    assemble(Bundle.open(fp32_bundle.path), repository, runner="onnxruntime:fp32")
    with (
        TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server,
        ClipClient(server.grpc_url) as client,
    ):
        outcome = build(photos, path, client)
        assert [item.path for item in outcome.manifest.skipped] == ["animals/text.jpg"]
        assert "expected one of JPEG, PNG" in outcome.manifest.skipped[0].reason
        assert outcome.manifest.count == 40
        here, there = SearchIndex.open(built), SearchIndex.open(path)
        np.testing.assert_allclose(there.embeddings, here.embeddings, atol=1e-4)
        terms = [Term(text="a cat"), Term(picture=photos / "002.jpg", weight=0.5)]
        expected = here.find(clip, terms, 10)
        # An index made by the server, asked in this process, and the other way round.
        assert same(there.find(client, terms, 10), expected)
        assert same(here.find(client, terms, 10), expected)
        assert same(there.find(clip, terms, 10), expected)
        told = run("query", path, "a cat", "--url", server.grpc_url, "--json")
        served = json.loads(told.splitlines()[-1])["hits"]
        local = there.find(clip, [Term(text="a cat")], 10)
        assert [hit["path"] for hit in served] == [hit.path for hit in local]
