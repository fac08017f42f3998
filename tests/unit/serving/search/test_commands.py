"""The commands of `search`, and the same search through a server."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from serving.bundles.bundle import Bundle
from serving.cli.search import app
from serving.clients.triton import ClipClient
from serving.errors import InputError
from serving.search.build import build
from serving.search.index import SearchIndex
from serving.search.query import Term
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.paths import CHECKOUT
from tests.support.search_data import BAD, SERVING, bundle_of, contents, fill, paths, same


def run(*arguments: object) -> str:
    """Run a command that succeeds, and return its standard output."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_search_commands_work_in_sequence(photos, tmp_path, fp32_bundle, clip):
    path, bundle = tmp_path / "photos.index", bundle_of(fp32_bundle)
    (photos / "bad.jpg").write_bytes(b"no picture")
    told = json.loads(run("build", photos, "--output", path, *bundle, "--json").splitlines()[-1])
    assert (told["images"], told["embedded"], told["layout"]["kind"]) == (40, 40, "exact")
    assert [item["path"] for item in told["skipped"]] == ["bad.jpg"]
    told = run("build", photos, "--output", path, "--kind", "hnsw", *bundle)
    assert re.search(r"40 images, hnsw with links 32.*recall@10 1\.000 over 20 queries", told)

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
        assert drawn.height > 3 * 160  # the query image and two rows
        pixels = np.asarray(drawn.convert("RGB").crop((12, 84, 172, 244)), np.int16)
    with Image.open(image) as picture:
        shown = np.asarray(picture.convert("RGB").resize((8, 8), Image.Resampling.BOX), np.int16)
    small = np.asarray(
        Image.fromarray(pixels.astype(np.uint8)).resize((8, 8), Image.Resampling.BOX)
    )
    assert np.abs(small - shown)[:, 2:6].mean() < 30  # the image is drawn there

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
    assert "41 images" in told
    assert "(1 embedded, 40 kept, 1 skipped)" in told
    assert "(1 embedded, 41 kept, 1 skipped)" in run("update", path, *bundle)
    assert "32 images" in run("remove", path, "zoo/*")
    told = json.loads(run("info", path, "--json"))
    assert told["count"] == len(paths(path))
    assert told["model"]["weights_sha256"] == fp32_bundle.manifest.provenance.weights_sha256
    assert "hnsw with links 32" in run("info", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("query", "INDEX", "word " * 500), "502 tokens.*77.*shorten it or give --truncate"),
        (("query", "INDEX"), "nothing to search for; give a text, such as 'a red circle', or --im"),
        (("query", "INDEX", "--not", "a cat"), "nothing to search for"),
        (("query", "INDEX", "a cat", "--top", "41"), "asked for 41 hits, .* holds 40 images"),
        (("query", "INDEX", "a", "b", "--weight", "1"), "1 weights for 2 terms; give one --weight"),
        (("query", "nowhere", "a cat"), "nowhere is not a search index"),
        (("info", "nowhere"), "nowhere is not a search index"),
    ],
)
@pytest.mark.wording
def test_invalid_arguments_are_rejected_with_one_message(built, fp32_bundle, arguments, message):
    arguments = [str(built) if a == "INDEX" else a for a in arguments]
    bundle = [] if arguments[0] == "info" else bundle_of(fp32_bundle)
    before = contents(built)
    done = CliRunner().invoke(app, [*arguments, *bundle])
    assert isinstance(done.exception, InputError)
    assert re.search(message, str(done.exception))
    assert contents(built) == before


@pytest.mark.wording
def test_command_error_is_one_line(built, fp32_bundle):
    command = (*SERVING, "query", str(built), "a", "--top", "41", *bundle_of(fp32_bundle))
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: asked for 41 hits, .* ask for 1 to 40\n", done.stderr)


@pytest.mark.wording
def test_missing_files_are_reported_beside_the_sheet(tmp_path, fp32_bundle):
    photos, path = fill(tmp_path / "photos", 3), tmp_path / "few.index"
    bundle, sheet = bundle_of(fp32_bundle), tmp_path / "sheet.png"
    run("build", photos, "--output", path, *bundle)
    assert len(re.findall(r"│ +\d+ │", run("query", path, "a cat", *bundle))) == 3  # not 10
    (photos / "002.jpg").unlink()
    title = "a very long query about something that is told in many words"
    done = CliRunner().invoke(app, ["query", str(path), title, "--sheet", str(sheet), *bundle])
    assert done.exit_code == 0
    assert re.search(r"not on the sheet: .*002\.jpg: no such file", done.stderr)
    with Image.open(sheet) as drawn:
        assert drawn.width > 500  # as wide as its title


def test_help_does_not_load_faiss():
    code = "import sys, serving.__main__; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0


def test_index_of_a_server_equals_local_index(fp32_bundle, photos, built, clip, tmp_path):
    (photos / "animals" / "text.jpg").write_bytes(BAD["animals/text.jpg"])
    repository, path = tmp_path / "repository", tmp_path / "served.index"
    assemble(Bundle.open(fp32_bundle.path), repository, runner="onnxruntime:fp32")
    with (
        TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server,
        ClipClient(server.grpc_url) as client,
    ):
        outcome = build(photos, path, client)
        assert [item.path for item in outcome.manifest.skipped] == ["animals/text.jpg"]
        assert "expected one of jpeg, png" in outcome.manifest.skipped[0].reason.lower()
        assert outcome.manifest.count == 40
        here, there = SearchIndex.open(built), SearchIndex.open(path)
        np.testing.assert_allclose(there.embeddings, here.embeddings, atol=1e-4)
        terms = [Term(text="a cat"), Term(picture=photos / "002.jpg", weight=0.5)]
        expected = here.find(clip, terms, 10)
        # The index built by the server is queried in this process, and vice versa.
        assert same(there.find(client, terms, 10), expected)
        assert same(here.find(client, terms, 10), expected)
        assert same(there.find(clip, terms, 10), expected)
        told = run("query", path, "a cat", "--url", server.grpc_url, "--json")
        served = json.loads(told.splitlines()[-1])["hits"]
        local = there.find(clip, [Term(text="a cat")], 10)
        assert [hit["path"] for hit in served] == [hit.path for hit in local]
