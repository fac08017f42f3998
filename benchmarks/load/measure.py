"""Load benchmark of Triton with perf_analyzer, checked with an independent client.

Each point is a load on `clip_image` or `clip_text`, with mixed image sizes or text lengths. It
includes the time that a request spends in each step of the ensemble, from Triton's statistics.
`against_eager.py` adds the comparison with a loop around eager float32.

In the embedded server, Triton's response cache is disabled, so that each text is computed. The
configuration of a running server is not changed: each measurement sends texts that the server has
not seen, and cache hits are counted.

`perf_analyzer.py` and `async_client.py` generate the load, and `workload.py` defines the requests.
"""

import itertools
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.load.against_eager import against_eager
from benchmarks.load.async_client import AsyncClient
from benchmarks.load.perf_analyzer import open_perf_analyzer
from benchmarks.load.plan import Plan, Sweep, agreement_of, saturation_of
from benchmarks.load.step_times import Statistics, counted
from benchmarks.load.workload import WINDOWS, Client, Load, Mode, Wire, mixed_pictures, mixed_texts
from benchmarks.machine.environment import environment
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOWERS
from serving.clients.triton import ClipClient
from serving.errors import InputError, RunnerError, ServerError
from serving.triton.repository import assemble, assembled_latencies
from serving.triton.server import TritonServer
from serving.util.files import sha256_of
from serving.util.progress import Progress
from serving.util.results import (
    Agreement,
    Environment,
    LeftOut,
    LoadRun,
    Point,
    Saturation,
)

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

Urls = Mapping[Wire, str]
"""URLs of a server by protocol: grpc://host:port, http://host:port, or both."""


def measure_embedded(
    bundle: Bundle, plan: Plan, repository: Path, runner: str, progress: Progress
) -> LoadRun:
    """Assemble `bundle` to `repository`, serve it with the embedded Triton, and measure it.

    Raises:
        ClipDeployError: the bundle cannot be assembled or served; see `serving.triton`.
    """
    here = environment()
    progress("assembling")
    assemble(bundle, repository, runner=runner, progress=progress)
    runners = dict.fromkeys(TOWERS, runner)
    if runner == "auto":  # the fastest runner of each tower comes first
        runners = {timed.tower: timed.runner for timed in reversed(assembled_latencies(repository))}
    switch_cache_off(repository)
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        run = _begun(
            here,
            bundle,
            server="the embedded Triton",
            runners={str(tower): name for tower, name in runners.items()},
            shares_machine=True,
            response_cache="off",
            plan=plan,
        )
        urls: Urls = {"grpc": server.grpc_url, "http": server.http_url}
        return _measure(bundle, plan, urls, server.admin_key, run, progress)


def measure_running(
    bundle: Bundle, plan: Plan, urls: Urls, progress: Progress, admin_key: str | None = None
) -> LoadRun:
    """Measure a running server.

    Args:
        bundle: bundle that the server serves.
        plan: loads to measure.
        urls: URLs of the server; a protocol without a URL is not measured.
        progress: receives the steps.
        admin_key: administrative key, if the statistics of the server require one.

    Raises:
        ServerError: the server does not answer, serves another model, requires another key, or is
            used by other clients meanwhile.
    """
    hosts = {url.partition("://")[2].rpartition(":")[0] for url in urls.values()}
    run = _begun(
        environment(),
        bundle,
        server="a running Triton",
        runners=None,
        shares_machine=bool(hosts & set(_LOOPBACK)),
        response_cache="as the server is configured",
        plan=plan,
    )
    plan = replace(plan, sweeps=tuple(sweep for sweep in plan.sweeps if sweep.wire in urls))
    return _measure(bundle, plan, urls, admin_key, run, progress)


def urls_of(grpc: str | None, http: str | None) -> Urls:
    """Return the given URLs by protocol.

    Raises:
        InputError: a URL has another protocol.
    """
    given: dict[Wire, str | None] = {"grpc": grpc, "http": http}
    for wire, url in given.items():
        if url is not None and not url.startswith(f"{wire}://"):
            raise InputError(f"expected {wire}://host:port of a running server, got {url!r}")
    return {wire: url for wire, url in given.items() if url is not None}


def switch_cache_off(repository: Path) -> None:
    """Disable the response cache of every model in `repository`."""
    for path in repository.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        config.ClearField("response_cache")
        path.write_text(text_format.MessageToString(config))


def _begun(
    here: Environment,
    bundle: Bundle,
    *,
    server: str,
    runners: dict[str, str] | None,
    shares_machine: bool,
    response_cache: str,
    plan: Plan,
) -> LoadRun:
    """Return a run without measurements."""
    return LoadRun(
        environment=here,
        bundle=bundle.manifest.name,
        server=server,
        runners=runners,
        shares_machine=shares_machine,
        response_cache=response_cache,
        perf_analyzer=None,
        mix={},
        window_s=plan.window_s,
        points=(),
        saturation=(),
        agreement=(),
        against_eager=None,
        left_out=(),
        seconds=0.0,
    )


def _measure(
    bundle: Bundle,
    plan: Plan,
    urls: Urls,
    admin_key: str | None,
    run: LoadRun,
    progress: Progress,
) -> LoadRun:
    start = time.monotonic()
    for url in urls.values():
        ClipClient(url).close()  # raises ServerError unless the server serves one of our models
    with ExitStack() as stack:
        client, version, missing = _main_client(stack)
        fresh = run.response_cache == "off"
        session = _Session(bundle, plan, urls, admin_key, client, progress, fresh=fresh)
        session.left_out += missing
        for sweep in plan.sweeps:
            session.sweep(sweep)
    url = urls.get("grpc") or urls["http"]
    runner = run.runners["image"] if run.runners else None
    against = against_eager(bundle, url, plan.images, plan.rounds, progress, runner=runner)
    return replace(
        run,
        perf_analyzer=version,
        mix=session.mix,
        points=tuple(session.points),
        saturation=tuple(session.saturation),
        agreement=tuple(session.agreement),
        against_eager=against,
        left_out=tuple(session.left_out),
        seconds=time.monotonic() - start,
    )


def _main_client(stack: ExitStack) -> tuple[Client, str | None, list[LeftOut]]:
    """Return perf_analyzer and its version; else the asyncio client and the reason."""
    try:
        analyzer = stack.enter_context(open_perf_analyzer())
    except RunnerError as error:
        return AsyncClient(), None, [LeftOut(what="perf_analyzer", reason=str(error))]
    return analyzer, f"{analyzer.version}, sha256 {sha256_of(analyzer.binary)}", []


class _Session:
    """Measurement of sweeps, and their results.

    Args:
        fresh: whether the server has seen no text before.
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        urls: Urls,
        admin_key: str | None,
        client: Client,
        show: Progress,
        *,
        fresh: bool,
    ) -> None:
        self._bundle, self._plan, self._urls, self._show = bundle, plan, urls, show
        self._client, self._second = client, AsyncClient()
        self.mix: dict[str, str] = {}
        self.points: list[Point] = []
        self.saturation: list[Saturation] = []
        self.agreement: list[Agreement] = []
        self.left_out: list[LeftOut] = []
        self._key = admin_key
        self._images = mixed_pictures()
        # The cache of a running server may contain the texts of an earlier measurement.
        self._seeds = itertools.count(0 if fresh else time.time_ns())
        loads = (len(sweep.concurrency) + len(sweep.rates) for sweep in plan.sweeps)
        self._done, self._total = 0, sum(loads)

    def sweep(self, sweep: Sweep) -> None:
        """Measure all concurrencies, then rates below saturation, then both clients in turns."""
        self._warm_up(sweep)
        first = len(self.points)
        for concurrency in sweep.concurrency:
            self._point(self._client, sweep, "concurrency", concurrency)
        found = saturation_of(self.points[first:])
        if found is None:
            return
        self.saturation.append(found)
        for fraction in sweep.rates:
            self._point(self._client, sweep, "rate", round(fraction * found.throughput_per_s, 1))
        if isinstance(self._client, AsyncClient) or not sweep.compared:
            return
        compared = {found.concurrency, *sweep.concurrency[: self._plan.lowest_too]}
        compared &= {p.load for p in self.points[first:] if p.client == self._client.name}
        for concurrency in sorted(compared):
            self._compare(sweep, concurrency)

    def _compare(self, sweep: Sweep, concurrency: int) -> None:
        """Measure a load with both clients; see `Agreement`."""
        what = f"{sweep.model} over {sweep.wire}, {concurrency} in flight, both clients"
        self._show(what, self._done, self._total)
        found: dict[str, list[float]] = {self._client.name: [], self._second.name: []}
        try:
            for turn in range(3):
                pair = (self._second, self._client)
                for client in pair[:: -1 if turn == 1 else 1]:
                    load = self._load(sweep, "concurrency", concurrency)
                    load = replace(load, window_s=self._plan.compared_window_s)
                    measured = client.measure(load)
                    found[client.name].append(measured.throughput_per_s)
        except ServerError as error:
            self.left_out.append(LeftOut(what=what, reason=str(error)))
            return
        self.agreement.append(
            agreement_of(
                sweep,
                concurrency,
                perf_analyzer=found[self._client.name],
                asyncio=found[self._second.name],
            )
        )

    def _warm_up(self, sweep: Sweep) -> None:
        """Send the largest load, so that runtimes have seen all batch sizes."""
        self._show(f"warming up {sweep.model} over {sweep.wire}", self._done, self._total)
        load = self._load(sweep, "concurrency", sweep.concurrency[-1])
        self._second.measure(replace(load, window_s=max(0.5, self._plan.window_s / WINDOWS)))

    def _point(self, client: Client, sweep: Sweep, mode: Mode, amount: float) -> None:
        """Measure a load; if the client fails, use the asyncio client, which tolerates errors."""
        unit = "in flight" if mode == "concurrency" else "requests/s"
        what = f"{sweep.model} over {sweep.wire}, {amount:g} {unit}, {client.name}"
        self._show(what, self._done, self._total)
        load = self._load(sweep, mode, amount)
        statistics = Statistics(self._urls[sweep.wire], self._key)
        before = statistics.at_rest()
        try:
            measured = client.measure(load)
        except ServerError as error:
            self.left_out.append(LeftOut(what=what, reason=str(error)))
            if client is not self._second:
                self._point(self._second, sweep, mode, amount)
            return
        server = counted(sweep.model, before, statistics.at_rest())
        self._done += client is self._client
        self.points.append(
            Point(
                client=client.name,
                protocol=sweep.wire,
                model=sweep.model,
                mode=mode,
                load=amount,
                throughput_per_s=measured.throughput_per_s,
                p50_ms=measured.p50_ms,
                p95_ms=measured.p95_ms,
                p99_ms=measured.p99_ms,
                errors=measured.errors,
                stable=measured.stable,
                client_cpu_share=measured.cpu_share,
                cache_hits=server.cache_hits,
                steps=server.steps,
            )
        )

    def _load(self, sweep: Sweep, mode: Mode, amount: float) -> Load:
        workload = self._images
        if sweep.model == "clip_text":  # new texts for each measurement
            workload = mixed_texts(self._bundle, next(self._seeds))
        self.mix[sweep.model] = workload.mix
        return Load(
            workload=workload,
            wire=sweep.wire,
            address=self._urls[sweep.wire].partition("://")[2],
            mode=mode,
            load=amount,
            window_s=self._plan.window_s,
            admin_key=self._key,
        )
