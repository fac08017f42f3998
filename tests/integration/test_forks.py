"""Clients in forked processes answer, or raise an error at once. Every test has a time limit."""

import subprocess
import sys
import time

import pytest

from serving.triton.repository import assemble
from serving.triton.server import TritonServer

LIMIT_S = 30.0
TIMEOUT_S = 5.0

SCRIPT = r"""
import multiprocessing, os, sys, threading, time
from tests.support.servers import encoded
case, url, http, bundle = sys.argv[1:]
TIMEOUT = 5.0

def client(url=url):
    from serving import ClipClient
    return ClipClient(url, timeout=TIMEOUT)

def use(opened):
    return opened.embed_texts(["a cat", "a dog"]), opened.embed_images([bytes_of_image()] * 40)

def bytes_of_image():
    return encoded(1)

def in_child(action):
    begin = time.monotonic()
    try:
        texts, images = action()
        print("answered", texts.shape, images.shape, f"{time.monotonic() - begin:.2f}")
    except Exception as error:
        print("raised", type(error).__name__, f"{time.monotonic() - begin:.2f}")
    sys.stdout.flush()

def forked(action, leave=sys.exit):
    if (child := os.fork()) == 0:
        in_child(action)
        leave(0)  # by default an ordinary exit, with all its handlers
    _, status = os.waitpid(child, 0)
    assert status == 0, status

def fresh():
    with client() as opened:
        return use(opened)

if case == "used":
    opened = client(); use(opened); forked(lambda: use(opened))
elif case == "unused":
    opened = client(); forked(lambda: use(opened))
elif case == "closed":
    with client() as opened: use(opened)
    forked(fresh)
elif case == "new":
    opened = client(); use(opened); forked(fresh)
elif case == "first":
    import tritonclient.grpc, tritonclient.http, serving.clients.triton
    forked(fresh)
elif case == "thread":
    opened = client(); use(opened)
    def fork():
        forked(lambda: use(opened), os._exit)
    thread = threading.Thread(target=fork)
    thread.start(); thread.join()
elif case == "busy":  # other threads of the parent are in the middle of requests
    opened = client(); stop = threading.Event()
    def load():
        while not stop.is_set(): use(opened)
    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads: thread.start()
    for _ in range(6): forked(lambda: use(opened), os._exit)  # gRPC may crash at an ordinary exit
    stop.set()
    for thread in threads: thread.join()
elif case == "grandchild":
    opened = client(); use(opened)
    def again():
        result = use(opened); forked(lambda: use(opened)); return result
    forked(again)
elif case == "multiprocessing":
    opened = client(); use(opened)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=in_child, args=(lambda: use(opened),)) for _ in range(3)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
elif case == "http after grpc":
    opened = client(); use(opened)
    def other():
        with client(http) as new: return use(new)
    forked(other)
# With onnxruntime imported before the fork, an ordinary exit of the child hangs or aborts (1.31).
elif case == "local":
    from serving import LocalClip
    opened = LocalClip(bundle)
    with opened:
        use(opened); forked(lambda: use(opened), os._exit)
        def again():
            with LocalClip(bundle) as new: return use(new)
        forked(again, os._exit)
        def reopened():
            with opened: return use(opened)
        forked(reopened, os._exit)
elif case == "local later":
    from serving import LocalClip
    opened = LocalClip(bundle)
    def enter():
        with opened: return use(opened)
    forked(enter, os._exit)
if case not in ("first", "local", "local later", "closed"):
    print("parent", *(found.shape for found in use(opened)))
"""

PARENT = "parent (2, 32) (40, 32)"


@pytest.fixture(scope="module")
def server(fp32_bundle, tmp_path_factory):
    repository = tmp_path_factory.mktemp("forks") / "repository"
    assemble(fp32_bundle, repository, runner="onnxruntime:fp32", max_batch_size=16)
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


def run(case, server, protocol, bundle):
    """Return the lines that the children and then the parent printed, without their times."""
    url = getattr(server, f"{protocol}_url")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, case, url, server.http_url]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, str(bundle.path)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - begin < LIMIT_S
    lines = done.stdout.splitlines()
    for line in lines:
        if not line.startswith("parent"):
            assert float(line.rsplit(" ", 1)[1]) < TIMEOUT_S
    return [line if line.startswith("parent") else line.rsplit(" ", 1)[0] for line in lines]


ANSWERED = "answered (2, 32) (40, 32)"
HTTP_CASES = {
    "used": 1,
    "unused": 1,
    "new": 1,
    "thread": 1,
    "busy": 6,
    "grandchild": 2,
    "multiprocessing": 3,
}


@pytest.mark.parametrize("case", HTTP_CASES)
def test_http_client_works_in_forked_processes(case, server, fp32_bundle):
    assert run(case, server, "http", fp32_bundle) == [ANSWERED] * HTTP_CASES[case] + [PARENT]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_client_first_created_in_the_child_works(protocol, server, fp32_bundle):
    assert run("first", server, protocol, fp32_bundle) == [ANSWERED]


def test_new_http_client_works_after_all_others_were_closed(server, fp32_bundle):
    assert run("closed", server, "http", fp32_bundle) == [ANSWERED]


def test_http_client_works_in_a_child_of_a_process_that_used_grpc(server, fp32_bundle):
    assert run("http after grpc", server, "grpc", fp32_bundle) == [ANSWERED, PARENT]


@pytest.mark.parametrize("case", ["used", "unused", "new", "thread", "busy", "multiprocessing"])
def test_grpc_client_raises_at_once_in_forked_processes(case, server, fp32_bundle):
    raised = ["raised ServerError"] * HTTP_CASES[case]
    assert run(case, server, "grpc", fp32_bundle) == [*raised, PARENT]


def test_local_client_raises_in_the_child_unless_it_was_opened_there(server, fp32_bundle):
    expected = ["raised RunnerError", ANSWERED, ANSWERED]
    assert run("local", server, "http", fp32_bundle) == expected
    assert run("local later", server, "http", fp32_bundle) == [ANSWERED]
