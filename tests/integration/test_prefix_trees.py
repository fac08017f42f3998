"""Tests of prefix trees for label sets, in process and on a real Triton server.

Embeddings are compared with those computed text by text.
"""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

import serving.runners.autotune
from serving.bundles.bundle import Bundle
from serving.clients import local
from serving.clients.endpoint import admin_headers
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import BundleError, ServerError, TextError
from serving.runners.autotune import passed, prefix_tree_runner
from serving.runners.prefix_tree import open_prefix_tree
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec
from serving.tasks import zero_shot
from serving.tasks.zero_shot import ZeroShotClassifier, embed_labels
from serving.triton.repository import assemble
from serving.triton.server import TritonServer

LABELS = [f"{size} {thing}" for size in ("red", "blue", "small") for thing in "abcdefghij"]
LABELS += ["a bird that sings all the day long in a tree", "naïve café 🐈"]
TEMPLATES = [f"a {way} photo of {which} {{}}." for way in ("good", "bad", "dark", "cropped")
             for which in ("a", "the", "one", "many", "my")]  # fmt: skip
FEW = LABELS[:2], TEMPLATES[:2]


def without_trees(bundle: Bundle, path: Path, *, verdicts_only: bool = False) -> Path:
    """Copy `bundle` without its prefix tree graphs, or only without their verdicts."""
    shutil.copytree(bundle.path, path)
    artifacts = tuple(
        replace(a, verdicts=()) if a.graph == "prefix_tree" else a
        for a in bundle.manifest.artifacts
        if a.graph != "prefix_tree" or verdicts_only
    )
    manifest = replace(bundle.manifest, artifacts=artifacts)
    (path / "manifest.json").write_text(manifest.to_json())
    return path


@pytest.fixture(scope="module")
def plain(tree_bundle, tmp_path_factory) -> Path:
    return without_trees(tree_bundle, tmp_path_factory.mktemp("plain") / "bundle")


@pytest.fixture(scope="module")
def expected(plain) -> np.ndarray:
    with LocalClip(plain) as clip:
        return embed_labels(clip, LABELS, TEMPLATES)


# ------------------------------------------------------------------ in process


@pytest.mark.parametrize(
    ("runner", "least"), [("onnxruntime:fp32", 0.99999), ("onnxruntime:int8", 0.98)]
)
def test_prefix_tree_embeddings_equal_text_by_text_embeddings(tree_bundle, expected, runner, least):
    with LocalClip(tree_bundle.path, runner) as clip:
        got = embed_labels(clip, LABELS, TEMPLATES)
        assert clip._tree is not None
        assert clip._tree.name == runner
    assert got.shape == expected.shape
    assert (got * expected).sum(axis=1).min() >= least
    with LocalClip(tree_bundle.path, runner) as clip:
        embed_labels(clip, *FEW)
        assert clip._tree is None  # the prefix tree graph is not opened for a few texts


def test_client_can_be_reopened(tree_bundle, expected):
    clip = LocalClip(tree_bundle.path)
    for _ in range(2):
        with clip:
            np.testing.assert_allclose(embed_labels(clip, LABELS, TEMPLATES), expected, atol=1e-5)
        assert clip._tree is None


@pytest.mark.parametrize("verdicts_only", [False, True], ids=["none", "refused"])
def test_without_a_passed_prefix_tree_texts_run_one_by_one(
    tree_bundle, expected, tmp_path, verdicts_only
):
    path = without_trees(tree_bundle, tmp_path / "bundle", verdicts_only=verdicts_only)
    with LocalClip(path) as clip:
        np.testing.assert_allclose(embed_labels(clip, LABELS, TEMPLATES), expected, atol=1e-6)
        assert clip._tree is None


def test_mixed_texts_keep_their_order(tree_bundle, plain):
    rng = np.random.default_rng(0)
    words = ["cat", "a", "naïve", "🐈", "photograph", "bus", "42"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 14))) for _ in range(3000)]
    texts += ["word " * 75, "a", texts[0]]
    with LocalClip(tree_bundle.path) as trees, LocalClip(plain) as other:
        np.testing.assert_allclose(trees.embed_texts(texts), other.embed_texts(texts), atol=1e-5)
        assert trees._tree is not None


def test_grouped_embedding_reports_progress_and_errors(tree_bundle, expected, monkeypatch):
    monkeypatch.setattr(zero_shot, "_GROUP", 600)
    monkeypatch.setattr(local, "_TREE_TOKENS", 1000)
    told: list[tuple[str, int, int]] = []
    with LocalClip(tree_bundle.path) as clip:
        got = embed_labels(clip, LABELS, TEMPLATES, progress=lambda *at: told.append(at))
        assert clip._tree is not None
        with pytest.raises(TextError, match=r"labels\[32\]: in prompt .* 'a good photo"):
            embed_labels(clip, [*LABELS, "word " * 75], TEMPLATES)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert told == [("embedding texts", done, 640) for done in (0, 600)]


def test_classifier_can_be_saved_and_loaded(tree_bundle, plain, pictures, tmp_path):
    files = sorted(pictures.iterdir())
    with LocalClip(plain) as clip:
        wanted = ZeroShotClassifier(clip, LABELS, TEMPLATES).classify(files)
        with LocalClip(tree_bundle.path) as trees:
            ZeroShotClassifier(trees, LABELS, TEMPLATES).save(tmp_path / "labels.npz")
            assert trees._tree is not None
        loaded = ZeroShotClassifier.load(tmp_path / "labels.npz", clip)
        np.testing.assert_allclose(loaded.classify(files), wanted, atol=1e-5)


def test_damaged_prefix_tree_is_rejected(tree_bundle, tmp_path):
    path = Path(shutil.copytree(tree_bundle.path, tmp_path / "bundle"))
    with (path / "prefix_tree.fp32.onnx").open("ab") as file:
        file.write(b"\0")
    with (
        LocalClip(path) as clip,
        pytest.raises(BundleError, match=r"prefix_tree\.fp32\.onnx is not the file that was expo"),
    ):
        embed_labels(clip, LABELS, TEMPLATES)


# ------------------------------------------------------------------ selected runner


class Delayed:
    """Wrapper that makes a runner much slower than any other."""

    def __init__(self, runner) -> None:
        self.runner = runner

    def __enter__(self):
        self.runner.__enter__()
        return self

    def __exit__(self, *reason):
        return self.runner.__exit__(*reason)

    def run(self, batch):
        serving.runners.autotune.time.sleep(0.3)
        return self.runner.run(batch)


def delay(monkeypatch, where: str, opened, *slow_ones: RunnerSpec) -> None:
    def slow(bundle, *arguments):
        runner = opened(bundle, *arguments)
        return Delayed(runner) if arguments[-1] in slow_ones else runner

    monkeypatch.setattr(serving.runners.autotune, where, slow)


FP32, FP16, INT8 = (RunnerSpec("onnxruntime", name) for name in ("fp32", "fp16", "int8"))


def test_requested_runner_also_runs_the_prefix_tree(tree_bundle, plain, tiny_bundle):
    for spec in passed(tree_bundle, "prefix_tree"):
        assert prefix_tree_runner(tree_bundle, str(spec), spec) == spec
    assert prefix_tree_runner(tree_bundle, "onnxruntime:fp16", FP16) is None
    for name in ("auto", "onnxruntime:fp32"):
        assert prefix_tree_runner(tiny_bundle, name, FP32) is None
        assert prefix_tree_runner(Bundle.open(plain), name, FP32) is None


def test_auto_selects_the_fastest_runner(tree_bundle, monkeypatch):
    """The fastest prefix tree runner wins, unless the text tower is faster than all of them."""
    tower = RunnerSpec("openvino", "fp32")
    slow = [spec for spec in passed(tree_bundle, "prefix_tree") if spec != INT8]
    assert slow
    delay(monkeypatch, "open_prefix_tree", open_prefix_tree, *slow)
    delay(monkeypatch, "open_runner", open_runner, tower)
    assert prefix_tree_runner(tree_bundle, "auto", tower) == INT8
    delay(monkeypatch, "open_prefix_tree", open_prefix_tree, *slow, INT8)
    assert prefix_tree_runner(tree_bundle, "auto", FP32) is None


def test_auto_runner_embeds_label_sets_in_process(tree_bundle, expected):
    with LocalClip(tree_bundle.path, "auto") as clip:
        got = embed_labels(clip, LABELS, TEMPLATES)
    assert (got * expected).sum(axis=1).min() >= 0.98


# ------------------------------------------------------------------ on a server


@pytest.fixture(scope="module")
def repository(tree_bundle, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trees") / "repository"
    return assemble(tree_bundle, path, runner="onnxruntime:fp32")


@pytest.fixture(scope="module")
def server(repository):
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


def counted(server, model: str) -> int:
    """Number of texts that a model of the server has embedded."""
    with tritonclient.http.InferenceServerClient(server.http_url.partition("://")[2]) as client:
        found = client.get_inference_statistics(
            model, headers=admin_headers("http", server.admin_key)
        )
    return int(found["model_stats"][0]["inference_count"])


def test_prefix_tree_model_is_assembled_only_where_supported(
    repository, tree_bundle, plain, tmp_path
):
    bundle = Bundle.open(repository / "prefix_tree" / "1" / "bundle")
    names = {p.name for p in bundle.path.iterdir()}
    assert names == {"manifest.json", "prefix_tree.fp32.onnx"}
    others = [
        assemble(Bundle.open(plain), tmp_path / "plain", runner="onnxruntime:fp32"),
        assemble(tree_bundle, tmp_path / "native", backend="onnxruntime"),
    ]
    for other in others:
        assert not (other / "prefix_tree").exists()
        assert (other / "text_tower").exists()


@pytest.mark.parametrize("protocol", ["grpc_url", "http_url"])
def test_served_probabilities_equal_those_without_prefix_trees(server, plain, pictures, protocol):
    files, tower = sorted(pictures.iterdir()), counted(server, "text_tower")
    labels = [f"{label} by {protocol}" for label in LABELS]
    with ClipClient(getattr(server, protocol)) as client, LocalClip(plain) as other:
        before = counted(server, "prefix_tree")
        served = client.classify(files, labels, TEMPLATES)
        np.testing.assert_allclose(served, other.classify(files, labels, TEMPLATES), atol=1e-5)
        assert counted(server, "prefix_tree") == before + len(labels) * len(TEMPLATES)
        np.testing.assert_array_equal(client.classify(files, labels, TEMPLATES), served)
        few = client.classify(files, *FEW)
        np.testing.assert_allclose(few, other.classify(files, *FEW), atol=1e-5)
    assert counted(server, "text_tower") == tower


def test_server_errors_name_the_label(server, pictures):
    files = sorted(pictures.iterdir())[:1]
    with (
        ClipClient(server.grpc_url) as client,
        pytest.raises((TextError, ServerError), match=r"labels\[1\]: in prompt template"),
    ):
        client.classify(files, ["cat", "word " * 100], TEMPLATES)


@pytest.fixture(scope="module")
def picture(pictures) -> Path:
    return sorted(pictures.iterdir())[0]


MANY = [f"{word} {index}" for word in ("a", "the") for index in range(500)]


def test_small_label_set_is_not_blocked_by_a_large_one(server, picture):
    templates = [f"{index} photos of {{}}" for index in range(30)]
    before, ended = counted(server, "prefix_tree"), []

    def large() -> np.ndarray:
        with ClipClient(server.http_url) as client:
            answer = client.classify([picture], MANY, templates)
        ended.append("large")
        return answer

    with ThreadPoolExecutor(1) as pool, ClipClient(server.grpc_url) as client:
        waits = pool.submit(large)
        while counted(server, "prefix_tree") < before + 512:
            time.sleep(0.01)
        client.classify([picture], ["small", "and", "new"])
        ended.append("small")
        assert waits.result().shape == (1, 1000)
    assert ended == ["small", "large"]


def test_canceled_request_is_not_computed_to_the_end(server, picture):
    """The client cancels a request of 60,000 texts; the server stops embedding soon after."""
    templates = [f"nobody waits {index} {{}}" for index in range(60)]
    before = counted(server, "prefix_tree")
    done = threading.Event()
    address = server.grpc_url.partition("://")[2]
    with tritonclient.grpc.InferenceServerClient(address) as client:
        given = []
        for name, values in (
            ("IMAGE", [picture.read_bytes()]),
            ("LABELS", [label.encode() for label in MANY]),
            ("TEMPLATES", [template.encode() for template in templates]),
        ):
            given.append(tritonclient.grpc.InferInput(name, [len(values)], "BYTES"))
            given[-1].set_data_from_numpy(np.array(values, np.object_))
        call = client.async_infer("clip_zero_shot", given, lambda result, error: done.set())
        while counted(server, "prefix_tree") == before:
            time.sleep(0.01)
        call.cancel()
        assert done.wait(10)
    seen = [-1, counted(server, "prefix_tree")]
    while seen[-1] != seen[-2]:
        time.sleep(0.5)
        seen.append(counted(server, "prefix_tree"))
    assert before < seen[-1] < before + 60_000


def test_prefix_tree_model_answers_direct_requests(server, tree_bundle):
    """The model accepts direct requests; a bad one fails and the next one is answered."""

    def asked(ids: np.ndarray) -> np.ndarray:
        tensor = tritonclient.grpc.InferInput("input_ids", list(ids.shape), "INT32")
        tensor.set_data_from_numpy(ids)
        return client.infer("prefix_tree", [tensor]).as_numpy("text_embeds")

    end = tree_bundle.manifest.text.end_id
    address = server.grpc_url.partition("://")[2]
    with tritonclient.grpc.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException, match="lack the end-of-text token"):
            asked(np.ones((1, 8), np.int32))
        assert asked(np.full((3, 8), end, np.int32)).shape == (3, 32)


def test_prefix_tree_chunk_is_in_the_configuration(repository):
    text = (repository / "clip_zero_shot" / "config.pbtxt").read_text()
    assert json.dumps("256") in text[text.index("prefix_tree_chunk") :]
