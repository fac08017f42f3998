"""Ray: connection to a cluster, division of its CPUs and GPUs, and the pool of actors."""

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
from serving.util.finite import check_count, check_positive
from serving.util.machine import cpu_count
from serving.util.progress import Progress

_MAX_THREADS = 4
"""Maximum number of threads of a worker on CPUs. More threads scale poorly within one batch; fewer
mean more workers, each with its own copy of the model."""
_OBJECT_STORE = 128 << 20
"""Size in bytes. Only shard numbers pass through the object store."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Resources of a job. For None, `crew_of` chooses."""

    workers: int | None = None
    threads: int | None = None
    gpus: float | None = None
    """GPUs per worker; may be a fraction."""
    address: str | None = None
    """Address of a running cluster, such as `auto` or `ray://host:port`. None: start Ray here."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: `workers` or `threads` is less than 1, or `gpus` is negative or not finite.
        """
        for name in ("workers", "threads"):
            if (count := getattr(self, name)) is not None:
                check_count(name, count)
        if self.gpus:
            check_positive("gpus", self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Number of workers of a job, and the threads and GPUs of each."""

    workers: int
    threads: int
    gpus: float


@contextmanager
def connected(address: str | None, progress: Progress) -> Iterator[None]:
    """Connect to Ray: to the one in this process, to the cluster at `address`, or to a new one."""
    # Read when Ray is imported. Otherwise every Ray Data pool logs an error that arguments of its
    # actors may be lost.
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
        _check_reachable(address)
    try:
        with _silenced_stderr():  # Ray prints its log level
            ray.init(**options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        if address is not None:
            raise _no_cluster(address, error) from error
        raise ServerError(f"Ray failed to start on this machine: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def run_on_cluster(address: str, job: Callable[..., Result], progress: Progress) -> Result:
    """Run `job` as a task of the cluster at `ray://...` and forward its progress.

    Ray Data does not work through Ray's client (2.60: `'Worker' object has no attribute
    'core_worker'`), but it works within a task.
    """
    with connected(address, progress):
        import ray
        from ray.util.queue import Queue

        queue, remote = Queue(actor_options={"num_cpus": 0}), ray.remote(num_cpus=0, max_retries=0)
        task: Any = remote(_run_with_queue).remote(job, queue)
        finished: list[Any] = []
        while not finished:
            finished, _ = ray.wait([task], timeout=0.5)
            for step in queue.get_nowait_batch(queue.qsize()):
                progress(*step)
        try:
            result: Result = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ClipDeployError):
                raise error.cause from None
            raise
    return result


def _run_with_queue(job: Callable[..., Any], queue: Any) -> Any:
    def put(step: str, done: int = 0, total: int = 0) -> None:
        queue.put((step, done, total))

    return job(progress=put)


def _check_reachable(address: str) -> None:
    """Raise a ServerError if no server listens at `address`; Ray would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ServerError:
    return ServerError(
        f"no Ray cluster at {address}: {error}",
        advice="start one with `ray start --head`, set RAY_AUTH_MODE=token if it requires a token, "
        "or leave out --address",
    )


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Discard everything that is written to standard error, by C++ code too."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:  # noqa: PTH123  no file
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def crew_of(runner: str, resources: Resources) -> Crew:
    """Divide a cluster into workers: by default one per GPU, or of up to four threads each.

    Raises:
        InputError: the cluster is too small for the requested workers.
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
        choices = list(range(max(1, most if gpus else min(most, _MAX_THREADS)), 0, -1))
    room = {threads: _capacity(nodes, threads, gpus) for threads in choices}
    wanted = resources.workers or max(1, room[choices[-1]] if gpus else 1)
    threads = next((threads for threads in choices if room[threads] >= wanted), choices[-1])
    if room[threads] < wanted:
        each = f"{threads} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        has = [sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")]
        raise InputError(
            f"{wanted} workers of {each} do not fit a cluster of {has[0]:g} CPUs and {has[1]:g} "
            f"GPUs, which has room for {room[threads]}",
            advice="give fewer --workers or --threads, or another --runner",
        )
    return Crew(workers=resources.workers or room[threads], threads=threads, gpus=gpus)


def _capacity(nodes: list[dict[str, Any]], threads: int, gpus: float) -> int:
    """Return the number of workers that fit; a worker cannot span nodes."""
    fits = (
        min(node.get("CPU", 0) // threads, node.get("GPU", 0) // gpus if gpus else math.inf)
        for node in nodes
    )
    return int(sum(fits))


def _on_gpu(runner: str) -> bool:
    return runtime_of(known(runner)).device == "cuda"


def chosen_runner(runner: str, bundle: Path, crew: Crew, progress: Progress) -> str:
    """Return `runner`, or for `auto` the fastest runner on a worker."""
    if runner != "auto":
        return runner
    import ray

    progress("timing runners")
    # max_calls=1 ends the process after the task, which frees the memory of the runtimes it timed.
    timing = ray.remote(num_cpus=crew.threads, num_gpus=crew.gpus, max_calls=1)(fastest_runner)
    try:
        chosen: str = ray.get(timing.remote(bundle, crew.threads))
    except BundleError as error:  # raised by Ray as a subclass whose message has a traceback
        raise BundleError(str(getattr(error, "cause", error))) from error
    return chosen


def embed_shards(
    job: Job, pending: list[dict[str, int]], shards: int, crew: Crew, progress: Progress
) -> tuple[int, float]:
    """Embed the pending shards; return the number of rows, and when the first worker was ready."""
    import ray.data
    import ray.exceptions

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # One block per shard, because Ray retries and reports blocks.
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
                raise RunnerError(f"a worker failed: {answer['failure']}")
            done, rows = done + 1, rows + answer["rows"]
            ready = min(ready or answer["ready"], answer["ready"])
            progress(_step(job, crew, done, shards), done, shards)
    except ray.exceptions.RayError as error:
        raise ServerError(
            f"Ray gave up after {done} of {shards} shards: {error}",
            advice="run the same command again to resume",
        ) from error
    return rows, ready


def _step(job: Job, crew: Crew, done: int, shards: int) -> str:
    """Return the progress text, in steps of 10 %: without a terminal each new text is a line."""
    workers = f"{crew.workers} worker{'s' * (crew.workers > 1)} x {crew.threads} threads"
    return f"embedding, {job.runner}, {workers}: {done * 10 // shards * 10} %"
