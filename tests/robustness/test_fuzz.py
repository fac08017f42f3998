"""Mutated pictures, odd texts and malformed requests: an answer or a plain refusal, and no more.

In process Hypothesis gives the seeds, and the one that repeats what fails. Against the live server
each request has a seed of its own, which a failure names.
"""

import contextlib
import html
import http.client
import io
import json
import os
import random
import re
import time
import urllib.parse
import warnings
from collections import Counter
from operator import itemgetter
from pathlib import Path

import ftfy
import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.bundles.manifest import ImageSpec
from serving.errors import ImageError, TextError
from serving.inputs.decode import decode
from serving.inputs.preprocess import preprocess
from serving.inputs.tokenizer import Tokenizer, clean, decode_text
from serving.limits import FORMATS
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support import fuzzing
from tests.support.servers import make_repository

SOAK = bool(os.environ.get("CLIP_SOAK"))
BODIES = 10_000 if SOAK else 500  # of pictures, and of texts
REQUESTS = 2_000 if SOAK else 200  # of each protocol
DEADLINE_S = 30.0  # a mutated header may announce 64 megapixels, on a machine that is busy
FILES = fuzzing.image_files()
SIZE = 32

IDENTITY = """
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        return [pb.InferenceResponse([
            pb.Tensor("SAME_" + name, pb.get_input_tensor_by_name(request, name).as_numpy())
            for name in ("TEXT", "PIXELS")
        ]) for request in requests]
"""

examples = settings(
    max_examples=BODIES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def spec(pipeline):
    return ImageSpec(
        size=SIZE,
        resize=SIZE,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        pipeline=pipeline,
    )


# ------------------------------------------------------------------ in process


class Slowest:
    """The bodies that took longest: each within the deadline, and what they take by themselves."""

    def __init__(self):
        self.bodies = []

    def saw(self, body, seconds):
        assert seconds < DEADLINE_S, body[:300]
        self.bodies = sorted([*self.bodies, (seconds, body)], key=itemgetter(0))[-5:]

    def again(self, work, *arguments):
        """CPU time in ms, the best of three: what else the machine does has no part in it."""
        every = [[self._timed(work, body, *arguments) for _ in range(3)] for _, body in self.bodies]
        return 1000 * max(map(min, every))

    @staticmethod
    def _timed(work, *arguments):
        began = time.process_time()
        with contextlib.suppress(ImageError, TextError):
            work(*arguments)
        return time.process_time() - began


def by_pillow(data):
    """What Pillow makes of the whole file, metadata and all; None if it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
    except Exception:
        return None
    return image


def test_any_picture_is_pixels_or_an_image_error(figure):
    seen, files = Counter(), list(FILES.values())
    slowest = Slowest()

    @examples
    @given(st.randoms(use_true_random=True), st.sampled_from(("openai", "huggingface")))
    def check(rng, pipeline):
        data = fuzzing.mangled(rng, files)
        began = time.perf_counter()
        try:
            pixels = preprocess(data, spec(pipeline))
        except ImageError:
            seen["refused"] += 1
        else:
            seen["pixels"] += 1
            assert (pixels.dtype, pixels.shape) == (np.uint8, (3, SIZE, SIZE))
        slowest.saw(data, time.perf_counter() - began)

    check()
    assert min(seen.values()) > BODIES / 20
    figure(
        "fuzzed pictures",
        f"{seen.total():,} bodies: {seen['pixels']:,} embeddable, {seen['refused']:,} ImageError, "
        f"nothing else; slowest {slowest.again(preprocess, spec('openai')):.0f} ms of CPU",
    )


def test_what_is_cut_out_of_a_damaged_picture_changes_no_pixel(figure):
    seen, files = Counter(), list(FILES.values())

    @examples
    @given(st.randoms(use_true_random=True))
    def check(rng):
        data = fuzzing.mangled(rng, files)
        whole = by_pillow(data)
        if whole is None or whole.width * whole.height > 1 << 22:
            return
        try:
            cut = decode(data)
        except ImageError as error:
            refusal = str(error)
        else:
            seen["same"] += 1
            assert (cut.mode, cut.size) == (whole.mode, whole.size)
            assert cut.tobytes() == whole.tobytes()
            return
        assert "allowed" in refusal  # by our limits, such as that of scans

    check()
    assert seen["same"] > BODIES / 20
    figure("metadata is cut out unread", f"{seen['same']:,} damaged pictures have Pillow's pixels")


@pytest.fixture(scope="module")
def tokenize(fp32_bundle):
    return Tokenizer(fp32_bundle.tokenizer, fp32_bundle.manifest.text)


def as_openai(text):
    """`basic_clean`, `whitespace_clean` and `lower` of `clip/simple_tokenizer.py`."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


def tokenized(text, tokenize):
    text = decode_text(text) if isinstance(text, bytes) else text
    return tokenize([text], truncate=True)


def test_any_text_is_ids_or_a_text_error(figure, tokenize, fp32_bundle):
    seen, text_spec = Counter(), fp32_bundle.manifest.text
    slowest = Slowest()
    anything = st.text(st.characters(exclude_categories=()), max_size=200)

    @examples
    @given(st.randoms(use_true_random=True), anything)
    def check(rng, text):
        given_texts = (text, fuzzing.odd_text(rng), fuzzing.odd_bytes(rng))
        for one in given_texts:
            began = time.perf_counter()
            try:
                ids = tokenized(one, tokenize)
            except TextError:
                seen["refused"] += 1
            else:
                seen["ids"] += 1
                assert (ids.dtype, ids.shape[0]) == (np.int32, 1)
                assert ids.shape[1] in text_spec.buckets
                assert 0 <= ids.min() <= ids.max() < text_spec.vocab_size
                assert ids[0, 0] == text_spec.start_id
                assert (ids == text_spec.end_id).sum() >= 1
            slowest.saw(one, time.perf_counter() - began)

    check()
    assert min(seen.values()) > BODIES / 20
    figure(
        "fuzzed texts",
        f"{seen.total():,} texts: {seen['ids']:,} token ids, {seen['refused']:,} TextError, "
        f"nothing else; slowest {slowest.again(tokenized, tokenize):.0f} ms of CPU",
    )


def test_an_accepted_text_is_cleaned_as_openai_does(figure, tokenize):
    seen = Counter()

    @examples
    @given(st.randoms(use_true_random=True))
    def check(rng):
        text = fuzzing.odd_text(rng)
        try:
            tokenize([text], truncate=True)
        except TextError:
            return
        seen["same"] += 1
        assert clean(text) == as_openai(text)

    check()
    assert seen["same"] > BODIES / 20
    figure("bounded cleaning of texts", f"{seen['same']:,} odd texts as OpenAI's code cleans them")


# ------------------------------------------------------------------ the live server

# What the embedded Triton (2.51) answers with 500 of its own accord, before a model sees it.
TRITONS = re.compile(
    rb'\{"error":"(failed to (parse the request JSON|get request params)|Unable to (parse|set) )'
)


@pytest.fixture(scope="module")
def server(fp32_bundle, tmp_path_factory):
    repository = tmp_path_factory.mktemp("fuzz") / "repository"
    assemble(fp32_bundle, repository, runner="onnxruntime:fp32", max_batch_size=64)
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


def processes(server):
    """Process ids of tritonserver and all that it started."""
    found, parents = {server.pid}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text()
        except OSError:  # it ended meanwhile
            continue
        parents[int(path.parent.name)] = int(stat.rsplit(")", 1)[1].split()[1])
    while children := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= children
    return found


class Http:
    """One request a connection: what is malformed may end it."""

    def __init__(self, server):
        self.address = server.http_url.partition("://")[2]

    def ask(self, method, path, headers, body):
        """Status and body of the answer; None and the reason where the connection was ended."""
        connection = http.client.HTTPConnection(self.address, timeout=DEADLINE_S)
        try:
            connection.request(method, path, body, headers)  # without a length, in chunks
            answer = connection.getresponse()
            return answer.status, answer.read()
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as error:
            return None, repr(error).encode()
        finally:
            connection.close()

    def fuzzed(self, rng, request):
        headers, body = fuzzing.http_body(rng, request)
        model = urllib.parse.quote(request["model"], safe="%./")
        version = f"/versions/{request['version']}" if request["version"] else ""
        return self.ask("POST", f"/v2/models/{model}{version}/infer", headers, body)

    def good(self, request):
        document, tail = fuzzing.as_json(request)
        head = json.dumps(document).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        return self.ask("POST", f"/v2/models/{request['model']}/infer", headers, head + tail)

    def ready(self):
        return self.ask("GET", "/v2/health/ready", {}, None)[0] == 200

    def wrong(self, status, answer):
        return status is None or (status == 500 and not TRITONS.match(answer))


class Grpc:
    """One connection for all."""

    def __init__(self, server):
        limits = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self.channel = grpc.insecure_channel(server.grpc_url.partition("://")[2], options=limits)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def send(self, message):
        try:
            answer = self.stub.ModelInfer(message, timeout=DEADLINE_S)
            return "OK", b"".join(answer.raw_output_contents)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError(error.details()) from error
            return error.code().name, error.details().encode()

    def fuzzed(self, rng, request):
        return self.send(fuzzing.grpc_message(rng, request))

    def good(self, request):
        return self.send(fuzzing.grpc_message(None, request))

    def ready(self):
        return self.stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=DEADLINE_S).ready

    def wrong(self, status, answer):
        # A request may itself ask for a timeout of a microsecond, and then gets UNAVAILABLE.
        return status in ("INTERNAL", "UNKNOWN") or (
            status == "UNAVAILABLE" and b"timeout" not in answer.lower()
        )


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_server_answers_whatever_comes(server, protocol, figure):
    asker = {"http": Http, "grpc": Grpc}[protocol](server)
    files = list(FILES.values())
    # Of every model one: the same bytes must come before and after.
    good = {}
    for seed in range(40):
        request = fuzzing.requests(random.Random(seed), files, SIZE)
        good.setdefault(request["model"], request)
    for request in good.values():
        asker.good(request)  # an answer from Triton's cache lacks the parameters of the first one
    before, pids = [asker.good(request) for request in good.values()], processes(server)
    assert len(good) == 7
    assert {status for status, _ in before} <= {200, "OK"}
    seen, slowest = Counter(), 0.0
    for seed in range(REQUESTS):
        rng = random.Random(seed)
        request = fuzzing.spoilt(rng, fuzzing.requests(rng, files, SIZE), files)
        began = time.perf_counter()
        status, answer = asker.fuzzed(rng, request)
        slowest = max(slowest, time.perf_counter() - began)
        assert processes(server) == pids, f"seed {seed}: a process ended"
        assert not asker.wrong(status, answer), f"seed {seed}: {status} {answer[:300]!r}"
        seen[status] += 1
    assert asker.ready()
    assert [asker.good(request) for request in good.values()] == before
    answers = ", ".join(f"{count:,} {status}" for status, count in seen.most_common())
    figure(
        f"fuzzed requests over {protocol}",
        f"{REQUESTS:,}: 0 crashes, 0 hangs, slowest {slowest * 1000:.0f} ms; a good request to "
        f"each of 7 models has the same bytes before and after; answers: {answers}",
    )


# The generator makes neither of these, which end tritonserver 2.51 itself: JSON nested about
# 100,000 deep (its parser calls itself), and a body in about a million chunks (it puts a list of
# them on the stack). Once they do not any more, they belong into the generator.
DEEP = 1_000_000
ENDS_TRITON = {
    "nested JSON": (
        {"Content-Type": "application/json"},
        b'{"inputs":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    ),
    "a body in a million chunks": (
        {"Transfer-Encoding": "chunked"},
        b"1\r\na\r\n" * 1_000_000 + b"0\r\n\r\n",
    ),
}


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:  # there is no such process
        return False


@pytest.mark.parametrize("kind", ENDS_TRITON)
def test_what_is_left_out_ends_triton_without_any_code_of_ours(kind, tmp_path):
    """On a repository that holds one model, which repeats its input."""
    headers, body = ENDS_TRITON[kind]
    with TritonServer(
        make_repository(tmp_path / "echo", echo=IDENTITY), http_port=0, grpc_port=0, metrics_port=0
    ) as running:
        address = running.http_url.partition("://")[2]
        connection = http.client.HTTPConnection(address, timeout=DEADLINE_S)
        connection.putrequest("POST", "/v2/models/echo/infer")
        for name, value in headers.items():
            connection.putheader(name, value)
        if "Transfer-Encoding" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.send(body)
            connection.getresponse()
        connection.close()
        deadline = time.monotonic() + DEADLINE_S
        while runs(running.pid):
            assert time.monotonic() < deadline, "it goes on"
            time.sleep(0.05)
