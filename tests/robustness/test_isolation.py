"""Tests that one bad request among 31 good ones changes no other answer and restarts no process.

The permitted answers are computed in process, with the runner and number of threads of the server:
each item in a batch of every size, at every position. The server's answers must be among these, bit
for bit.
"""

import asyncio
import io
import itertools
import os
import re
from dataclasses import dataclass

import numpy as np
import pytest
import tritonclient.grpc.aio
import tritonclient.http.aio
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from serving.inputs.labels import LabelSet
from serving.inputs.preprocess import preprocess
from serving.inputs.tokenizer import Tokenizer
from serving.runners.registry import missing, open_runner
from serving.tasks.zero_shot import softmax
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from serving.triton_models.label_cache import embedding_work
from tests.support.servers import BAD_PICTURES, metric, processes

TOGETHER = 32  # requests per round, one of them bad


RUNNER = "onnxruntime:fp32"


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("isolation") / "repository"
    assemble(tiny_bundle, path, runner=RUNNER, max_batch_size=TOGETHER)
    config = path / "clip_text" / "config.pbtxt"
    text = config.read_text()
    assert text.count("enable: true") == 1
    config.write_text(text.replace("enable: true", "enable: false"))  # the response cache
    with TritonServer(path, http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


ROUNDS = 200 if os.environ.get("CLIP_SOAK") else 5
PROTOCOLS = {"grpc": tritonclient.grpc.aio, "http": tritonclient.http.aio}
WORDS = ("cat", "dog", "old tree", "red bus at the stop", "café 🐈")


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle):
    return Tokenizer(tiny_bundle.tokenizer, tiny_bundle.manifest.text)


@pytest.fixture(scope="module")
def towers(tiny_bundle):
    with (
        open_runner(tiny_bundle, "image", RUNNER) as image,
        open_runner(tiny_bundle, "text", RUNNER) as text,
    ):
        yield {"image": image, "text": text}


def jpeg(index):
    grid = Image.fromarray(np.random.default_rng(index).integers(0, 256, (5, 7, 3), np.uint8))
    buffer = io.BytesIO()
    grid.resize((48 + index, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def clean(runner, rows):
    """Permitted embeddings of each row, as bytes: in batches of all sizes, at all positions."""
    found = [set() for _ in rows]
    for size, start in itertools.product(range(1, len(rows) + 1), range(len(rows))):
        places = [(start + place) % len(rows) for place in range(size)]
        batch = np.stack([rows[place] for place in places])
        for place, embedding in zip(places, runner.run(batch), strict=True):
            found[place].add(embedding.tobytes())
    return found


# ------------------------------------------------------------------ requests


@dataclass
class Kind:
    """Requests to one model: 31 good ones with their permitted answers, and bad ones."""

    model: str
    target: str
    good: list[dict[str, np.ndarray]]
    clean: list[set[bytes]]
    bad: list[tuple[dict[str, np.ndarray], str]]
    """Each with a pattern of the expected error message."""


def strings(*values, columns=()):
    data = [v if isinstance(v, bytes) else v.encode() for v in values]
    return np.array(data, np.object_).reshape(len(data), *columns)


def images(towers, tiny_bundle, tokenizer):
    pictures = [jpeg(index) for index in range(TOGETHER - 1)]
    pixels = [preprocess(picture, tiny_bundle.manifest.image) for picture in pictures]
    return Kind(
        "clip_image",
        "image_embeds",
        [{"image": strings(picture, columns=(1,))} for picture in pictures],
        clean(towers["image"], pixels),
        [({"image": strings(data, columns=(1,))}, said) for data, said in BAD_PICTURES.values()],
    )


def texts(towers, tiny_bundle, tokenizer):
    given = [f"{WORDS[n % 5]} {'very ' * (n % 3 * 7)}{n}" for n in range(TOGETHER - 1)]
    rows = [tokenizer([text])[0] for text in given]
    found = [set() for _ in rows]
    for length in {len(row) for row in rows}:  # only texts of equal length share a batch
        places = [place for place, row in enumerate(rows) if len(row) == length]
        one = clean(towers["text"], [rows[place] for place in places])
        for place, values in zip(places, one, strict=True):
            found[place] = values
    bad = [
        ("word " * 500, "502 tokens.*more than the model's 77"),
        (b"caf\xe9", r"texts\[0\]: the text is not UTF-8"),
        (" \n", "empty"),
        ("a\0b", "NUL"),
    ]
    return Kind(
        "clip_text",
        "text_embeds",
        [{"text": strings(text, columns=(1,))} for text in given],
        found,
        [({"text": strings(text, columns=(1,))}, said) for text, said in bad],
    )


def token_ids(towers, tiny_bundle, tokenizer):
    """Requests that go directly to the tower, where bad and good ones share a batch."""
    spec = tiny_bundle.manifest.text
    rows = np.full((TOGETHER - 1, 16), spec.end_id, np.int32)
    rows[:, 0] = spec.start_id
    rows[:, 1:5] = np.random.default_rng(0).integers(320, 40_000, (TOGETHER - 1, 4))
    beyond, below, endless = rows[:1].copy(), rows[:1].copy(), rows[:1].copy()
    beyond[0, 2], below[0, 2] = spec.vocab_size + 5, -1
    endless[:] = 7
    return Kind(
        "text_tower",
        "text_embeds",
        [{"input_ids": row[None]} for row in rows],
        clean(towers["text"], list(rows)),
        [
            ({"input_ids": beyond}, "expected 0 to 49407"),
            ({"input_ids": below}, "range from -1 to"),
            ({"input_ids": endless}, "lack the end-of-text token"),
        ],
    )


def labels(towers, tiny_bundle, tokenizer):
    """Images with labels that `new_labels` sets in each round."""
    kind = images(towers, tiny_bundle, tokenizer)
    good = [{"IMAGE": request["image"][0]} for request in kind.good]
    picture, two = good[0], {"LABELS": strings("cat", "dog")}
    bad = [
        ({**picture, "LABELS": strings("cat", "cat")}, "more than once"),
        ({**picture, "LABELS": strings(b"\xff", "cat")}, r"labels\[0\]: the text is not UTF-8"),
        ({**picture, "LABELS": strings("cat", "word " * 500)}, "more than the model's 77"),
        ({**picture, **two, "TEMPLATES": strings("a photo")}, r"template 'a photo' has no \{\}"),
        ({**two, "IMAGE": strings(BAD_PICTURES["truncated"][0])}, r"images\[0\]: .*truncated"),
        ({**two, "IMAGE": strings(BAD_PICTURES["bomb"][0])}, r"images\[0\]: .*pixels"),
        ({**two, "IMAGE": strings(b"")}, r"images\[0\]: .*got 0 bytes"),
    ]
    return Kind("clip_zero_shot", "PROBABILITIES", good, kind.clean, bad)


def new_labels(kind, number, towers, tiny_bundle, tokenizer):
    """Give all good requests a label set that is in no cache. Return the permitted answers."""
    given = tuple(f"{word} {number}" for word in WORDS)
    for request in kind.good:
        request["LABELS"] = strings(*given)
    labels = LabelSet(given, tiny_bundle.manifest.templates)
    embedded = result(embedding_work(labels, tokenizer, towers["text"].run, TOGETHER))
    scale = np.float32(tiny_bundle.manifest.logit_scale)
    return [
        {softmax(scale * (np.frombuffer(e, np.float32)[None] @ embedded.T)).tobytes() for e in one}
        for one in kind.clean
    ]


def result(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


async def ask(connection, module, kind, inputs):
    tensors = []
    for name, data in inputs.items():
        tensors.append(module.InferInput(name, data.shape, np_to_triton_dtype(data.dtype)))
        tensors[-1].set_data_from_numpy(data)
    try:
        answer = await connection.infer(kind.model, tensors)
    except InferenceServerException as error:
        return error
    return answer.as_numpy(kind.target)


async def one_round(server, kind, number, clean_answers):
    protocol = list(PROTOCOLS)[number % 2]
    module, url = PROTOCOLS[protocol], getattr(server, f"{protocol}_url")
    bad, said = kind.bad[number // 2 % len(kind.bad)]
    place = number * 7 % TOGETHER
    requests = [*kind.good[:place], bad, *kind.good[place:]]
    async with module.InferenceServerClient(url.partition("://")[2]) as connection:
        answers = await asyncio.gather(*(ask(connection, module, kind, r) for r in requests))
    refusal = answers.pop(place)
    assert isinstance(refusal, InferenceServerException), (number, said)
    assert refusal.status() in ("400", "StatusCode.INVALID_ARGUMENT"), (number, refusal)
    assert re.search(said, refusal.message()), (number, refusal)
    for index, (answer, expected) in enumerate(zip(answers, clean_answers, strict=True)):
        assert isinstance(answer, np.ndarray), (number, index, answer)
        assert answer.tobytes() in expected, (number, index, said)


@pytest.mark.parametrize(
    ("make", "tower"),
    [(images, "image"), (texts, "text"), (token_ids, "text"), (labels, "image")],
    ids=["images", "texts", "token ids", "labels"],
)
def test_bad_request_does_not_affect_other_requests(
    server, towers, tiny_bundle, tokenizer, figure, request, make, tower
):
    kind = make(towers, tiny_bundle, tokenizer)
    before = processes(server)
    assert len(before) >= 5  # at least one per Python model
    counters = ("nv_inference_count", "nv_inference_exec_count")
    counted = [metric(server, name, f"{tower}_tower") for name in counters]
    for number in range(ROUNDS):
        expected = kind.clean
        if make is labels:
            expected = new_labels(kind, number, towers, tiny_bundle, tokenizer)
        asyncio.run(one_round(server, kind, number, expected))
    assert processes(server) == before
    items, batches = (
        metric(server, name, f"{tower}_tower") - start
        for name, start in zip(counters, counted, strict=True)
    )
    assert items >= ROUNDS * (TOGETHER - 1)  # nothing came from a cache
    assert batches < items  # some batches have several items
    figure(
        f"isolation, {request.node.callspec.id}",
        f"{ROUNDS * (TOGETHER - 1):,} answers of {ROUNDS} rounds, each beside a bad request, equal "
        f"a clean run's bit for bit ({items / batches:.1f} a batch); none of {len(before)} "
        "processes restarted",
    )


@pytest.mark.parametrize("runner", ["onnxruntime:fp32", "onnxruntime:int8", "openvino:fp32"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_row_does_not_depend_on_the_content_of_other_rows(tiny_bundle, runner, tower):
    """An answer may depend on the number of requests in its batch, but not on their content."""
    if reason := missing(runner):
        pytest.skip(f"{runner}: {reason}")
    rng = np.random.default_rng(0)
    spec = tiny_bundle.manifest.text

    def rows(count):
        if tower == "image":
            return rng.integers(0, 256, (count, 3, 32, 32), np.uint8)
        ids = rng.integers(320, 40_000, (count, 16)).astype(np.int32)
        ids[:, rng.integers(2, 16)] = spec.end_id
        return ids

    with open_runner(tiny_bundle, tower, runner) as opened:
        for size in (2, 5, 8, 31, 32):
            batch, place = rows(size), int(rng.integers(size))
            expected = opened.run(batch)[place]
            for fill in (0, 255, None, None):
                other = rows(size)
                if fill is not None and tower == "image":
                    other[:] = fill
                other[place] = batch[place]
                np.testing.assert_array_equal(opened.run(other)[place], expected)
