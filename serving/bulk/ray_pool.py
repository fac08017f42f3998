"""Ray: started or connected to, its CPUs and GPUs divided, its actors given the shards."""

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from serving.bulk.worker import Job, Worker, fastest_runner
from serving.errors import BundleError, ClipDeployError, InputError, RunnerError, ServerError
from serving.runners.spec import known, runtime_of
from serving.util.machine import cpu_count
from serving.util.progress import Progress

_THREADS = 4
"""Of a worker on CPUs: more scale badly within one batch, fewer keep more copies of the model."""
_OBJECT_STORE = 128 << 20
"""Bytes; only numbers of shards go through it."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a job takes of the cluster; None: see `crew_of`."""

    workers: int | None = None
    threads: int | None = None
    gpus: float | None = None
    """A worker's share."""
    address: str | None = None
    """Of a running cluster, `auto` or `ray://host:port`; None: Ray is started on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The workers of a job, and what each of them takes."""

    workers: int
    threads: int
    gpus: float


@contextmanager
def connected(address: str | None, progress: Progress) -> Iterator[None]:
    """Ray, connected: the one that runs in this process already, one at `address`, or a new one."""
    # Read when Ray is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Or each pool of Ray Data prints, as an error, that its actors' arguments may be lost.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        progress("starting Ray")
        options |= {
            "address": "local",
            "num_cpus": cpu_count(),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
        }
    else:
        progress(f"connecting to Ray at {address}")
        options["address"] = address
        _knock(address)
    try:
        with _hushed():  # it tells of its log level
            ray.init(**options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        if address is not None:
            raise _no_cluster(address, error) from error
        raise ServerError(f"Ray does not start on this machine: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def run_on_cluster(address: str, job: Callable[..., Result], progress: Progress) -> Result:
    """Run `job` as a task of the cluster at `ray://...`; its `progress` is passed on.

    Ray Data does not work through Ray's client (2.60: `'Worker' object has no attribute
    'core_worker'`); a task of the cluster may use it.
    """
    with connected(address, progress):
        import ray
        from ray.util.queue import Queue

        told, remote = Queue(actor_options={"num_cpus": 0}), ray.remote(num_cpus=0, max_retries=0)
        task: Any = remote(_told).remote(job, told)
        finished: list[Any] = []
        while not finished:
            finished, _ = ray.wait([task], timeout=0.5)
            for step in told.get_nowait_batch(told.qsize()):
                progress(*step)
        try:
            result: Result = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ClipDeployError):
                raise error.cause from None
            raise
    return result


def _told(job: Callable[..., Any], told: Any) -> Any:
    def tell(step: str, done: int = 0, total: int = 0) -> None:
        told.put((step, done, total))

    return job(progress=tell)


def _knock(address: str) -> None:
    """Refuse at once an address where nobody listens: Ray would try it for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ServerError:
    return ServerError(
        f"no Ray cluster at {address}: {error}; start one by `ray start --head`, set RAY_AUTH_MODE="
        "token where it asks for a token, or leave --address out"
    )


@contextmanager
def _hushed() -> Iterator[None]:
    """Drop what is written to standard error, by C++ also."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:  # noqa: PTH123  no file
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def crew_of(runner: str, resources: Resources) -> Crew:
    """Divide the cluster: by default a worker a GPU, or workers of up to four threads.

    Raises:
        InputError: the cluster does not have what was asked for.
    """
    import ray

    listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in listed if node["Alive"]]
    has_gpu = any("GPU" in node for node in nodes)
    gpus = resources.gpus
    if gpus is None:
        gpus = float(has_gpu if runner == "auto" else _on_gpu(runner))
    if resources.threads is not None:
        choices = [resources.threads]
    else:
        most = max(int(node.get("CPU", 0)) for node in nodes)
        choices = list(range(max(1, most if gpus else min(most, _THREADS)), 0, -1))
    room = {threads: _room(nodes, threads, gpus) for threads in choices}
    wanted = resources.workers or max(1, room[choices[-1]] if gpus else 1)
    threads = next((threads for threads in choices if room[threads] >= wanted), choices[-1])
    if room[threads] < wanted:
        each = f"{threads} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        has = [sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")]
        raise InputError(
            f"{wanted} workers of {each} do not fit a cluster of {has[0]:g} CPUs and {has[1]:g} "
            f"GPUs: {room[threads]} would; give fewer --workers or --threads, or another --runner"
        )
    return Crew(workers=resources.workers or room[threads], threads=threads, gpus=gpus)


def _room(nodes: list[dict[str, Any]], threads: int, gpus: float) -> int:
    """Workers that fit; none spans nodes."""
    fits = (
        min(node.get("CPU", 0) // threads, node.get("GPU", 0) // gpus if gpus else math.inf)
        for node in nodes
    )
    return int(sum(fits))


def _on_gpu(runner: str) -> bool:
    return runtime_of(known(runner)).device == "cuda"


def chosen_runner(runner: str, bundle: Path, crew: Crew, progress: Progress) -> str:
    """`runner`, or in place of `auto` the fastest on a worker."""
    if runner != "auto":
        return runner
    import ray

    progress("timing runners")
    # max_calls: the process ends with it, and with the memory of the runtimes it tried.
    timing = ray.remote(num_cpus=crew.threads, num_gpus=crew.gpus, max_calls=1)(fastest_runner)
    try:
        chosen: str = ray.get(timing.remote(bundle, crew.threads))
    except BundleError as error:  # Ray's error is one of the task's own class, with a traceback
        raise BundleError(str(getattr(error, "cause", error))) from error
    return chosen


def embed_shards(
    job: Job, pending: list[dict[str, int]], shards: int, crew: Crew, progress: Progress
) -> tuple[int, float]:
    """Embed the shards of `pending`; the rows embedded, and when the first worker was ready."""
    import ray.data
    import ray.exceptions

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # A block a shard: what is retried when a worker dies, and told of when it is done.
    dataset = ray.data.from_items(pending, override_num_blocks=len(pending)).map_batches(
        Worker,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=crew.workers, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(job,),
        num_cpus=crew.threads,
        num_gpus=crew.gpus or None,
    )
    done = shards - len(pending)
    progress(_step(job, crew, done, shards), done, shards)
    rows, ready = 0, 0.0
    try:
        for answer in dataset.iter_rows():
            if answer["failure"]:
                raise RunnerError(f"a worker cannot go on: {answer['failure']}")
            done, rows = done + 1, rows + answer["rows"]
            ready = min(ready or answer["ready"], answer["ready"])
            progress(_step(job, crew, done, shards), done, shards)
    except ray.exceptions.RayError as error:
        raise ServerError(
            f"Ray gave up after {done} of {shards} shards: {error}; the same command goes on with "
            "the rest"
        ) from error
    return rows, ready


def _step(job: Job, crew: Crew, done: int, shards: int) -> str:
    """In tenths: where there is no bar, each new text is a line."""
    workers = f"{crew.workers} worker{'s' * (crew.workers > 1)} x {crew.threads} threads"
    return f"embedding, {job.runner}, {workers}: {done * 10 // shards * 10} %"
