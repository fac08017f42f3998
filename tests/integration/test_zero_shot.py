"""Tests of the model `clip_zero_shot` on a real Triton server."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from tritonclient.utils import InferenceServerException

from serving.clients.endpoint import admin_headers
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import ImageError, ServerError, TextError
from serving.tasks.zero_shot import embed_labels, softmax
from serving.triton.repository import assemble
from serving.triton.server import TritonServer

PROTOCOLS = ("grpc", "http")
ANY = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
DIM, CACHE_BYTES = 32, 300_000
LABELS = 1000 if os.environ.get("CLIP_SOAK") else 250
MANY = [f"{word} {index}" for word in ("a", "the") for index in range(500)]  # embeddings of 128 kB


@pytest.fixture(scope="module")
def repository(tiny_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("zero-shot") / "repository"
    assemble(tiny_bundle, path, runner="onnxruntime:fp32", max_batch_size=64)
    config = path / "clip_zero_shot" / "config.pbtxt"
    text = config.read_text()
    assert "67108864" in text
    config.write_text(text.replace("67108864", str(CACHE_BYTES)))
    return path


@pytest.fixture(scope="module")
def server(repository):
    with TritonServer(repository, **ANY) as running:
        yield running


@pytest.fixture(scope="module", params=PROTOCOLS)
def client(server, request):
    with ClipClient(url(server, request.param)) as opened:
        yield opened


@pytest.fixture(scope="module")
def local(tiny_bundle):
    with LocalClip(tiny_bundle.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def files(pictures):
    return sorted(pictures.iterdir())


@pytest.fixture(scope="module")
def picture(files):
    return files[0].read_bytes()


def url(server, protocol):
    return getattr(server, f"{protocol}_url")


def raw(server, protocol):
    module = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
    return module, module.InferenceServerClient(url(server, protocol).partition("://")[2])


def tensors(module, **inputs):
    made = []
    for name, values in inputs.items():
        data = np.array([v if isinstance(v, bytes) else v.encode() for v in values], np.object_)
        made.append(module.InferInput(name, [len(data)], "BYTES"))
        made[-1].set_data_from_numpy(data)
    return made


def ask(server, protocol, options=None, **inputs):
    """Send a request without `ClipClient`. Return PROBABILITIES and LOGITS."""
    module, client = raw(server, protocol)
    with client:
        result = client.infer("clip_zero_shot", tensors(module, **inputs), **(options or {}))
        return result.as_numpy("PROBABILITIES"), result.as_numpy("LOGITS")


def counts(server, model):
    """Rows and batches that a model has computed.

    Waits until the counters are stable, because Triton updates them after it has answered.
    """
    _, client = raw(server, "http")
    with client:
        seen = []
        while len(seen) < 3 or len(set(seen[-3:])) > 1:
            stats = client.get_inference_statistics(
                model, headers=admin_headers("http", server.admin_key)
            )["model_stats"][0]
            seen.append((int(stats["inference_count"]), int(stats["execution_count"])))
            time.sleep(0.05)
    return np.array(seen[-1])


def texts_embedded(server):
    return counts(server, "text_tower")[0]


# ------------------------------------------------------------------ results


@pytest.mark.parametrize("templates", [None, ["a drawing of a {}.", "{}", "two {} and a {}"]])
def test_served_probabilities_equal_in_process_probabilities(client, local, files, templates):
    labels = ["cat", "a red bus", "naïve café 🐈"]
    served = client.classify(files, labels, templates)
    assert (served.shape, served.dtype) == ((len(files), 3), np.float32)
    expected = local.classify(files, labels, templates)
    assert np.ptp(expected, axis=0).max() > 0.01  # the images differ
    np.testing.assert_allclose(served, expected, atol=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_logits_equal_those_of_transformers(server, tiny_checkpoint, files, protocol):
    model = CLIPModel.from_pretrained(tiny_checkpoint).eval()
    processor = CLIPImageProcessorPil.from_pretrained(tiny_checkpoint)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_checkpoint)
    labels = ["cat", "dog", "tree"]
    ids = tokenizer([f"a photo of a {label}." for label in labels], return_tensors="pt")
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")
    with torch.inference_mode():
        expected = model(**ids, pixel_values=pixels["pixel_values"]).logits_per_image.numpy()
    pictures = [file.read_bytes() for file in files]
    got, logits = ask(server, protocol, IMAGE=pictures, LABELS=labels)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits, expected, atol=0.02)  # scale 20; includes decoding
    np.testing.assert_allclose(got, softmax(logits), atol=1e-6)


def test_request_with_more_images_than_a_batch_is_answered(server, local, picture, files):
    pictures = [picture, files[1].read_bytes()] * 50
    got, _ = ask(server, "grpc", IMAGE=pictures, LABELS=["cat", "dog"])
    expected = local.classify(pictures[:2], ["cat", "dog"])
    np.testing.assert_allclose(got, np.tile(expected, (50, 1)), atol=1e-5)


# ------------------------------------------------------------------ caching and scheduling


def test_concurrent_first_requests_embed_the_labels_once(server, picture):
    labels = [f"thing {index}" for index in range(300)]
    before = texts_embedded(server)
    together = threading.Barrier(16)

    def first(index):
        together.wait()
        return ask(server, PROTOCOLS[index % 2], IMAGE=[picture], LABELS=labels)[0]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(first, range(16)))
    assert texts_embedded(server) - before == 300
    for answer in answers:
        np.testing.assert_allclose(answer, answers[0], atol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_repeated_request_runs_only_the_image_tower(server, picture, protocol):
    inputs = {"IMAGE": [picture] * 3, "LABELS": ["cup", "pan"], "TEMPLATES": ["my {}", "no {}"]}
    first = ask(server, protocol, **inputs)
    models = ("image_tower", "text_tower", "text_tokenize", "clip_text")
    before = {model: counts(server, model) for model in models}
    second = ask(server, protocol, **inputs)
    found = {model: list(counts(server, model) - before[model]) for model in models}
    assert found == {
        "image_tower": [3, 1],
        "text_tower": [0, 0],
        "text_tokenize": [0, 0],
        "clip_text": [0, 0],
    }
    np.testing.assert_array_equal(first, second)


def test_order_of_labels_distinguishes_label_sets(server, local, picture):
    one, _ = ask(server, "grpc", IMAGE=[picture], LABELS=["oak", "elm"], TEMPLATES=["a {}", "{}"])
    other, _ = ask(server, "grpc", IMAGE=[picture], LABELS=["elm", "oak"], TEMPLATES=["a {}", "{}"])
    np.testing.assert_allclose(one, other[:, ::-1], atol=1e-6)
    # A cache key of joined strings would confuse this set with the previous ones.
    joined, _ = ask(server, "grpc", IMAGE=[picture], LABELS=["oak"], TEMPLATES=["elm a {}", "{}"])
    assert joined.shape == (1, 1)


def test_least_recently_used_label_set_is_evicted(server, picture):
    """The server's cache holds two sets of this size; an evicted set is embedded again."""

    def embedded(prompt):
        before = texts_embedded(server)
        answer, _ = ask(server, "grpc", IMAGE=[picture], LABELS=MANY, TEMPLATES=[prompt])
        return texts_embedded(server) - before, answer

    first = embedded("1 {}")
    assert first[0] == 1000
    assert embedded("2 {}")[0] == 1000
    assert embedded("1 {}")[0] == 0
    assert embedded("3 {}")[0] == 1000  # evicts 2, which was used before 1
    assert embedded("1 {}")[0] == 0
    again = embedded("2 {}")
    assert again[0] == 1000
    assert embedded("1 {}")[0] == 0


def test_large_label_set_does_not_block_other_requests(server, local, picture):
    """Cached and small label sets do not wait for a set of `LABELS` labels in 80 templates."""
    labels = [f"label{index}" for index in range(LABELS)]
    templates = [f"{index} {{}}" for index in range(80)]
    ask(server, "grpc", IMAGE=[picture], LABELS=["known", "set"])
    done = []

    def large():
        answer = ask(server, "grpc", IMAGE=[picture], LABELS=labels, TEMPLATES=templates)
        done.append(time.monotonic())
        return answer

    before = texts_embedded(server)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(large)
        while counts_now(server, "text_tower") < before + 640:
            time.sleep(0.01)
        ask(server, "http", IMAGE=[picture], LABELS=["known", "set"])
        ask(server, "http", IMAGE=[picture], LABELS=["small", "and", "new"])
        answered = time.monotonic()
        got, logits = future.result()
    assert answered < done[0]
    assert got.shape == (1, LABELS)
    np.testing.assert_allclose(got.sum(), 1, atol=1e-5)
    assert texts_embedded(server) - before == 80 * LABELS + 3
    some = [0, LABELS // 2, LABELS - 1]
    expected = embed_labels(local, [labels[index] for index in some], templates)
    cosines = local.embed_images([picture]) @ expected.T
    np.testing.assert_allclose(logits[:, some], local.logit_scale * cosines, atol=1e-3)


def counts_now(server, model):
    _, client = raw(server, "http")
    with client:
        stats = client.get_inference_statistics(
            model, headers=admin_headers("http", server.admin_key)
        )["model_stats"][0]
    return int(stats["inference_count"])


# ------------------------------------------------------------------ cancellation


@pytest.mark.parametrize("way", ["cancelled", "deadline over gRPC", "time over HTTP"])
def test_abandoned_request_is_not_computed_to_the_end(server, picture, way):
    """The client abandons a request of 80,000 texts; the server stops embedding soon after."""
    inputs = {
        "IMAGE": [picture],
        "LABELS": MANY,
        "TEMPLATES": [f"{way} {index} {{}}" for index in range(80)],
    }
    before = texts_embedded(server)
    if way == "cancelled":
        module, client = raw(server, "grpc")
        ended = threading.Event()
        with client:
            call = client.async_infer(
                "clip_zero_shot", tensors(module, **inputs), lambda result, error: ended.set()
            )
            deadline = time.monotonic() + 30
            while counts_now(server, "text_tower") == before and time.monotonic() < deadline:
                time.sleep(0.01)
            call.cancel()
            assert ended.wait(10)
    elif way == "deadline over gRPC":
        with pytest.raises(InferenceServerException, match="Deadline"):
            ask(server, "grpc", {"client_timeout": 1.5}, **inputs)
    else:
        with pytest.raises(InferenceServerException, match=r"deadline of 1\.5 s passed") as refused:
            ask(server, "http", {"timeout": 1_500_000}, **inputs)
        assert refused.value.status() == "503"
    time.sleep(0.5)
    stopped = texts_embedded(server)
    time.sleep(0.5)
    assert texts_embedded(server) == stopped
    assert (way == "cancelled") <= stopped - before < 80_000
    # The unfinished embeddings must not be in the cache.
    small = {**inputs, "TEMPLATES": inputs["TEMPLATES"][:1]}
    ask(server, "grpc", **small)
    assert texts_embedded(server) == stopped + 1000


def test_shared_label_set_survives_one_canceled_client(server, picture):
    templates = [f"who stays {index} {{}}" for index in range(8)]
    inputs = {"IMAGE": [picture], "LABELS": MANY, "TEMPLATES": templates}
    before, pictures = texts_embedded(server), counts(server, "image_tower")[0]
    with ThreadPoolExecutor(1) as pool:
        module, client = raw(server, "grpc")
        with client:
            ended = threading.Event()
            call = client.async_infer(
                "clip_zero_shot", tensors(module, **inputs), lambda result, error: ended.set()
            )
            while counts_now(server, "text_tower") == before:
                time.sleep(0.01)
            stays = pool.submit(ask, server, "http", **inputs)
            while counts_now(server, "image_tower") < pictures + 2:  # it joins after its image
                time.sleep(0.01)
            time.sleep(0.2)
            call.cancel()
            assert ended.wait(10)
            answer, _ = stays.result()
    assert answer.shape == (1, 1000)
    assert texts_embedded(server) - before == 8_000


def test_concurrent_mixed_requests_get_their_own_answers(server, local, picture):
    """Cached, new, shared, large and invalid label sets, with valid and invalid images."""
    known = ["cat", "dog"]
    expected = local.classify([picture], known)
    ask(server, "grpc", IMAGE=[picture], LABELS=known)

    def one(index):
        protocol, kind = PROTOCOLS[index // 8 % 2], index % 8
        labels = {
            0: known,
            1: [f"new {index}", "other"],
            2: ["shared", "by", "four"],
            3: [f"{index} {number}" for number in range(200)],
            4: ["twice", "twice"],
            5: known,
            6: ["word " * 100, "cat"],
            7: known,
        }[kind]
        pictures = [b"no picture"] if kind == 5 else [picture] * (1 + index % 3)
        try:
            return kind, ask(server, protocol, IMAGE=pictures, LABELS=labels)[0]
        except InferenceServerException as error:
            return kind, error.message()

    with ThreadPoolExecutor(32) as pool:
        futures = [pool.submit(one, index) for index in range(32) for _ in range(2)]
        answers = [future.result(timeout=60) for future in futures]
    for kind, answer in answers:
        if kind in (4, 5, 6):
            assert {4: "more than once", 5: "images[0]", 6: "more than the model's 77"}[
                kind
            ] in answer.lower()
            continue
        np.testing.assert_allclose(answer.sum(axis=1), 1, atol=1e-5)
        if kind in (0, 7):
            np.testing.assert_allclose(answer[:1], expected, atol=1e-5)


# ------------------------------------------------------------------ invalid inputs

BAD = {
    "no labels": ({"LABELS": []}, "no labels to choose from; give at least one"),
    "no pictures": ({"IMAGE": []}, "no images to classify; give at least one"),
    "twice": ({"LABELS": ["cat", "dog", "cat"]}, "label 'cat' is given more than once"),
    "blank": ({"LABELS": ["cat", " "]}, r"labels\[1\]: the label is empty or only whitespace: ' '"),
    "nul": ({"LABELS": ["cat", "a\0b"]}, r"labels\[1\]: .*NUL character"),
    "bytes": ({"LABELS": [b"\xff\xfe"]}, r"labels\[0\]: the text is not UTF-8"),
    "no braces": ({"TEMPLATES": ["a {}", "a photo"]}, r"template 'a photo' has no \{\}"),
    "no templates": ({"TEMPLATES": []}, "no prompt templates"),
    "long": (
        {"LABELS": ["cat", "word " * 100], "TEMPLATES": ["{}", "a {}"]},
        r"labels\[1\]: in prompt template '\{\}': the text has 102 tokens.* model's 77",
    ),
    "long template": (
        {"TEMPLATES": ["{}" + " é" * 2700]},
        r"labels\[0\]: in .* 2703 tokens",
    ),
    "alone too long": ({"LABELS": ["word " * 80]}, r"labels\[0\]: in prompt .*more than the model"),
    "picture": ({"IMAGE": [b"nothing like it"]}, r"images\[0\]: expected one of JPEG, PNG"),
    "too many": (
        {"LABELS": MANY, "TEMPLATES": [f"{index} {{}}" for index in range(201)]},
        "1000 labels x 201 templates are 201000 texts, more than the 200000 allowed",
    ),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", BAD)
def test_invalid_request_is_rejected_with_a_reason(server, picture, protocol, kind):
    changed, message = BAD[kind]
    with pytest.raises(InferenceServerException, match=message) as refused:
        ask(server, protocol, **({"IMAGE": [picture], "LABELS": ["cat", "dog"]} | changed))
    assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert ask(server, protocol, IMAGE=[picture], LABELS=["cat", "dog"])[0].shape == (1, 2)


def test_image_index_counts_across_batches(server, picture):
    with pytest.raises(InferenceServerException, match=r"images\[70\]: expected one of JPEG"):
        ask(server, "grpc", IMAGE=[*[picture] * 70, b"nothing", picture], LABELS=["cat"])


def test_client_errors_name_the_invalid_input(client, files, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing like it")
    with pytest.raises(ImageError, match=r"images\[24\] \(.*bad\.jpg\): expected one of JPEG"):
        client.classify([*files, *files, *files, bad], ["cat", "dog"])
    with pytest.raises(TextError, match=r"^labels\[1\]: in prompt template 'a photo of"):
        client.classify(files * 3, ["cat", "word " * 100])
    with pytest.raises(TextError, match=r"labels\[1\]: the text has a lone surrogate"):
        client.classify(files, ["cat", "\ud800"])
    with pytest.raises(TextError, match="no labels to choose from"):
        client.classify(files, [])
    with pytest.raises(TextError, match=r"template 'a' has no \{\}"):
        client.classify(files, ["cat"], ["a"])
    assert client.classify([], ["cat"]).shape == (0, 1)
    assert client.classify(files, ["cat", "dog"]).shape == (len(files), 2)


def test_server_without_the_zero_shot_model_is_reported(repository, tmp_path, files):
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    shutil.rmtree(copy / "clip_zero_shot")
    with TritonServer(copy, **ANY) as running:
        for protocol in PROTOCOLS:
            with (
                ClipClient(url(running, protocol)) as client,
                pytest.raises(ServerError, match=r"not serve .*'clip_zero_shot'.*; assemble"),
            ):
                client.classify(files, ["cat"])


# ------------------------------------------------------------------ the command


def serving(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "serving", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_classify_command_agrees_for_server_and_bundle(server, tiny_bundle, pictures, tmp_path):
    labels, templates = tmp_path / "labels.txt", tmp_path / "templates.txt"
    labels.write_text("cat\n\n dog \n")
    templates.write_text("a {} here\nno {} there\n")
    common = [pictures, "--label", "tree", "--labels", labels, "--json"]
    answers = []
    own_runner = ["--bundle", tiny_bundle.path, "--runner", "onnxruntime:fp32"]
    for where in (["--url", server.grpc_url], own_runner):
        for prompts in (["--templates", templates], ["--template", "a {} here"], []):
            done = serving("classify", *common, *where, *prompts)
            assert done.returncode == 0, done.stderr
            answers.append(json.loads(done.stdout.splitlines()[-1])["images"])
    for row in answers[0]:
        assert list(row["probabilities"]) == ["tree", "cat", "dog"]
    by_server, by_bundle = answers[:3], answers[3:]
    assert by_server[0] != by_server[1] != by_server[2]
    for served, own in zip(by_server, by_bundle, strict=True):
        assert [row["image"] for row in served] == [row["image"] for row in own]
        values = [[list(row["probabilities"].values()) for row in rows] for rows in (served, own)]
        np.testing.assert_allclose(*values, atol=1e-5)
    done = serving("classify", pictures, "--labels", labels, "--bundle", tiny_bundle.path)
    assert "cat" in done.stdout
    assert "embedding texts" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no labels to choose from"),
        (("--labels", "/nowhere.txt"), "/nowhere.txt cannot be read"),
        (("--label", "a", "--templates", "openai-8"), "neither a file .* plain, openai-7"),
    ],
)
@pytest.mark.wording
def test_classify_command_reports_invalid_options(tiny_bundle, pictures, arguments, message):
    done = serving("classify", pictures, "--bundle", tiny_bundle.path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr)
