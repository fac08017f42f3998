"""Search compared with brute force, and the kinds of index."""

import re
from dataclasses import replace

import faiss
import numpy as np
import pytest

from serving.errors import InputError
from serving.search import index as search_index
from serving.search.build import build
from serving.search.faiss_index import TARGET, make, search
from serving.search.index import SearchIndex
from serving.search.query import Term, query_vector
from tests.support.search_data import (
    same,
    top,
)

QUERIES = ("a cat", "two dogs on a bench", "the colour red", "Ünïcödé")


def test_index_holds_the_embeddings_of_the_directory(folder, built, clip):
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


def test_text_and_image_queries_equal_brute_force(folder, built, clip):
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


def test_weighted_queries_equal_brute_force(folder, built, clip):
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
    assert [h.path for h in without] != [h.path for h in expected]  # negative terms count


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivf"])
def test_globs_filter_the_hits(built, index, folder, clip, kind):
    build(folder, index, clip, kind)
    opened, (query,) = SearchIndex.open(index), clip.embed_texts(["a cat"])
    cosines = opened.embeddings @ query
    for globs, pattern in (
        (["animals/*"], r"animals/"),  # includes files in subdirectories
        (["*.png", "zoo/*"], r".*\.png|zoo/"),
        (["zoo/über [[]x] *"], r"zoo/"),
        (["animals/cats/00?.jpg"], r"animals/cats/00.\.jpg"),
    ):
        kept = [row for row, e in enumerate(opened.entries) if re.match(pattern, e.path)]
        assert 0 < len(kept) < 40
        names = [opened.entries[row].path for row in kept]
        hits = opened.find(clip, [Term(text="a cat")], 40, globs)  # only the matching hits
        assert same(hits, top(cosines[kept], names, 40))
    with pytest.raises(InputError, match=r"no path in the index matches 'animal/\*'; give paths s"):
        opened.find(clip, [Term(text="a cat")], 5, ["animal/*"])


def test_blocks_of_a_filtered_search_are_merged(built, clip, monkeypatch):
    monkeypatch.setattr(search_index, "_BLOCK", 7)
    opened, queries = SearchIndex.open(built), clip.embed_texts(list(QUERIES))
    rows, cosines = opened.search(queries, 9, ["*"])
    expected = np.argsort(-(queries @ opened.embeddings.T), axis=1)[:, :9]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(cosines, opened.search(queries, 9)[1], atol=1e-6)


@pytest.fixture(scope="module")
def clustered():
    """4,000 unit vectors in 60 clusters, float32 [4000, 32], and 300 more of the same
    distribution."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(60, 32))
    x = centres[rng.integers(0, 60, 4300)] + 0.7 * rng.normal(size=(4300, 32))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return x[:4000], x[4000:]


@pytest.mark.parametrize(
    ("kind", "name"), [("hnsw", faiss.IndexHNSWFlat), ("ivf", faiss.IndexIVFFlat)]
)
def test_reported_recall_equals_brute_force(clustered, kind, name):
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
    assert np.mean(missed) < np.mean(found) - 0.2  # tuning is needed to reach the target


def test_change_of_index_kind_embeds_nothing(index, folder, counted):
    before = SearchIndex.open(index)
    outcome = build(folder, index, counted, "ivf")
    assert (counted.embedded, outcome.embedded, outcome.kept) == (0, 0, 40)
    after = SearchIndex.open(index)
    assert after.manifest.layout.kind == "ivf"
    assert after.manifest.layout.recall_at_10 >= TARGET
    np.testing.assert_array_equal(after.embeddings, before.embeddings)
    build(folder, index, counted)
    assert SearchIndex.open(index).manifest.layout.kind == "ivf"  # kept if none is given
    assert build(folder, index, counted, "exact").manifest.layout.recall_at_10 is None


def test_approximate_search_returns_all_requested_hits(clustered, clip, index):
    """IVF with one probe finds fewer than all vectors, but all are requested."""
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
