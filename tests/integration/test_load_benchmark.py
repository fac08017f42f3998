"""Tests of the load benchmark on a real Triton server.

Load comes from the asyncio client, and from perf_analyzer where it is installed.
"""

import asyncio
import base64
import ctypes
import io
import json
import socket
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tritonclient.utils import deserialize_bytes_tensor

from benchmarks import __main__ as command
from benchmarks.load import async_client, measure, perf_analyzer
from benchmarks.load.against_eager import against_eager
from benchmarks.load.async_client import AsyncClient
from benchmarks.load.measure import measure_embedded, measure_running, urls_of
from benchmarks.load.perf_analyzer import open_perf_analyzer, parse
from benchmarks.load.plan import Plan, Sweep, agreement_of, saturation_of
from benchmarks.load.step_times import STEPS, Statistics, counted
from benchmarks.load.workload import WINDOWS, Load, Workload, mixed_pictures, mixed_texts, steady
from benchmarks.report.tables import load_remarks, load_table
from serving.errors import InputError, RunnerError, ServerError
from serving.inputs.tokenizer import Tokenizer
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from serving.util.progress import silent
from serving.util.results import Point, Results

PROTOCOLS = ("grpc", "http")
WINDOW_S = 0.3


@pytest.fixture(scope="module")
def server(fp32_bundle, tmp_path_factory):
    """Server with the response cache on, as assembled."""
    repository = tmp_path_factory.mktemp("served") / "repository"
    assemble(fp32_bundle, repository, runner="onnxruntime:fp32")
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


@pytest.fixture(scope="module")
def analyzer():
    try:
        opened = open_perf_analyzer()
        running = opened.__enter__()
    except RunnerError as error:
        pytest.skip(str(error))
    yield running
    opened.__exit__(None, None, None)


@pytest.fixture
def no_analyzer(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.prefix", str(tmp_path))


def load_of(server, wire="grpc", workload=None, mode="concurrency", load=2, window_s=WINDOW_S):
    return Load(
        workload=workload or mixed_pictures(),
        wire=wire,
        address=getattr(server, f"{wire}_url").partition("://")[2],
        mode=mode,
        load=load,
        window_s=window_s,
        admin_key=server.admin_key,
    )


def corrupt() -> Workload:
    pictures = mixed_pictures()
    return replace(pictures, items=(*pictures.items[:3], b"not a picture"))


def point(load, throughput, **changes) -> Point:
    made = Point(
        client="perf_analyzer",
        protocol="grpc",
        model="clip_image",
        mode="concurrency",
        load=load,
        throughput_per_s=throughput,
        p50_ms=1.0,
        p95_ms=2.0,
        p99_ms=3.0,
        errors=0,
        stable=True,
        client_cpu_share=0.1,
        cache_hits=0,
        steps=(),
    )
    return replace(made, **changes)


def plan_of(*sweeps, **changes) -> Plan:
    plan = Plan(
        sweeps=sweeps,
        window_s=WINDOW_S,
        compared_window_s=WINDOW_S,
        lowest_too=False,
        images=8,
        rounds=1,
    )
    return replace(plan, **changes)


# Workloads.


def test_text_lengths_match_the_described_mix(fp32_bundle):
    spec = fp32_bundle.manifest.text
    texts = mixed_texts(fp32_bundle, seed=1, count=600)
    assert len(set(texts.items)) == 600
    tokenizer = Tokenizer(fp32_bundle.tokenizer, spec)
    lengths = [tokenizer([item.decode()]).shape[1] for item in texts.items]
    assert set(lengths) == set(spec.buckets)
    for bucket in spec.buckets:
        assert f"{bucket}: {lengths.count(bucket) / 600:.0%}" in texts.mix
    assert not set(texts.items) & set(mixed_texts(fp32_bundle, seed=2, count=600).items)


def test_image_sizes_match_the_described_mix():
    pictures = mixed_pictures()
    sizes = [Image.open(io.BytesIO(item)).size for item in pictures.items]
    for width, height in set(sizes):
        assert sizes.count((width, height)) == len(sizes) / 4
        assert f"{width}x{height}" in pictures.mix


# Clients.


@pytest.mark.parametrize("wire", PROTOCOLS)
@pytest.mark.parametrize(("mode", "amount"), [("concurrency", 3), ("rate", 40.0)])
def test_asyncio_client_counts_agree_with_triton(server, wire, mode, amount):
    statistics = Statistics(getattr(server, f"{wire}_url"), server.admin_key)
    before = statistics.at_rest()
    measured = AsyncClient().measure(load_of(server, wire, mode=mode, load=amount))
    steps = counted("clip_image", before, statistics.at_rest()).steps
    assert [step.model for step in steps] == list(STEPS["clip_image"])
    answered = round(measured.throughput_per_s * WINDOWS * WINDOW_S)
    # Triton also counts the half window before, and the requests in flight at the end.
    assert answered <= steps[0].requests == steps[1].requests <= 3 * answered + 20
    assert 0 < measured.p50_ms <= measured.p95_ms <= measured.p99_ms
    assert measured.errors == 0
    assert all(step.compute_ms > 0 and step.mean_batch >= 1 for step in steps)
    if mode == "concurrency":  # Little's law: requests in flight = throughput x mean latency
        assert measured.p50_ms < 1e3 * WINDOWS * amount / measured.throughput_per_s


@pytest.mark.parametrize("wire", PROTOCOLS)
def test_asyncio_client_counts_errors_and_continues(server, wire):
    statistics = Statistics(server.grpc_url, server.admin_key)
    before = statistics.at_rest()
    measured = AsyncClient().measure(load_of(server, wire, corrupt()))
    tower = counted("clip_image", before, statistics.at_rest()).steps[1]
    assert abs(3 * measured.errors - tower.requests) <= 9  # one of four fails; two are in flight
    assert measured.errors > 0
    assert measured.throughput_per_s > 0


@pytest.mark.parametrize("wire", PROTOCOLS)
def test_asyncio_client_raises_without_any_answer(server, wire):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(
        ServerError, match=r"no request was answered .* failed, the last one with: .+"
    ):
        AsyncClient().measure(replace(load_of(server, wire, window_s=0.1), address=address))


def test_latency_at_a_rate_starts_at_the_scheduled_time():
    async def run() -> list[float]:
        server, log = asyncio.Semaphore(1), async_client._Log()

        async def send(place: int) -> None:
            async with server:
                await asyncio.sleep(0.02)

        end = asyncio.get_running_loop().time() + 0.6  # the clock of time.perf_counter, on Linux
        await async_client._open(send, 150.0, end, log)
        return log.latencies

    latencies = asyncio.run(run())
    assert 45 < len(latencies) < 150
    assert latencies[-1] > 0.2  # the server does at most 50 requests/s, so the queue grew


# perf_analyzer.


@pytest.mark.parametrize("wire", PROTOCOLS)
@pytest.mark.parametrize(("mode", "amount"), [("concurrency", 3), ("rate", 40.0)])
def test_perf_analyzer_counts_agree_with_triton(server, analyzer, fp32_bundle, wire, mode, amount):
    statistics = Statistics(getattr(server, f"{wire}_url"), server.admin_key)
    texts = mixed_texts(fp32_bundle, seed=30 + len(wire + mode), count=4000)
    before = statistics.at_rest()
    measured = analyzer.measure(load_of(server, wire, texts, mode, amount))
    found = counted("clip_text", before, statistics.at_rest())
    assert [step.model for step in found.steps] == list(STEPS["clip_text"])
    answered = round(measured.throughput_per_s * WINDOWS * WINDOW_S)
    assert answered * 0.8 <= found.steps[0].requests + found.cache_hits <= 5 * answered + 20
    assert 0 < measured.p50_ms <= measured.p95_ms <= measured.p99_ms
    assert measured.errors == 0
    assert 0 < measured.cpu_share < 1


def test_perf_analyzer_stops_at_the_first_error(server, analyzer):
    with pytest.raises(
        ServerError, match=r"99 and no report at 2 requests in flight .*one of JPEG"
    ):
        analyzer.measure(load_of(server, workload=corrupt()))


def test_unstable_load_is_still_measured(server, analyzer, monkeypatch):
    monkeypatch.setattr("benchmarks.load.workload.STEADY", -1.0)
    measured = analyzer.measure(load_of(server))
    assert not measured.stable
    assert measured.throughput_per_s > 0


def test_perf_analyzer_reports_no_unstable_load_by_default(server, analyzer, tmp_path):
    data, report = tmp_path / "data.json", tmp_path / "report.csv"
    load = load_of(server, window_s=0.5)  # a shorter window may have no answer, a different error
    data.write_text(perf_analyzer.input_data(load.workload))
    options = perf_analyzer.arguments(load, data, report)
    options[options.index("--stability-percentage") + 1] = "0.0001"
    environment = perf_analyzer._environment(analyzer.libraries)
    done = subprocess.run(
        [analyzer.binary, *options], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "Failed to obtain stable measurement" in done.stderr
    assert done.returncode == 2
    assert not report.exists()


def test_window_without_answers_is_enlarged(server, analyzer, monkeypatch):
    load = load_of(server, load=1, window_s=0.002)
    monkeypatch.setattr(perf_analyzer, "_LARGER_WINDOWS", 0)
    with pytest.raises(ServerError, match=r"larger time window|requested model version"):
        analyzer.measure(replace(load, window_s=0.001))
    monkeypatch.setattr(perf_analyzer, "_LARGER_WINDOWS", 12)
    assert analyzer.measure(load).throughput_per_s > 0


def test_perf_analyzer_is_stopped_when_the_server_is_silent(server, analyzer, monkeypatch):
    monkeypatch.setattr(perf_analyzer, "_GRACE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"did not end within \d+ s at 2 requests in flight"):
            analyzer.measure(replace(load_of(server, "http", window_s=0.1), address=address))


def test_perf_analyzer_report_is_parsed():
    report = (
        "Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency,"
        "Avg latency\n4,155.391,15,20230,43583,50020,68030,24520\n"
    )
    passes = [
        f"  Pass [{number}] throughput: {rate} infer/sec. Avg latency: {latency} usec (std 9 usec)."
        for number, (rate, latency) in enumerate([(90.0, 24000), (150.5, 24500), (154.0, 24900)], 1)
    ]
    measured = parse(report, "\n".join(passes), 0.25)
    assert measured.throughput_per_s == 155.391
    assert (measured.p50_ms, measured.p95_ms, measured.p99_ms) == (20.23, 50.02, 68.03)
    assert not measured.stable
    again = [passes[1].replace("Pass [2]", "Pass [1]"), *passes[1:]]
    assert parse(report, "\n".join(again), 0.25).stable
    assert not parse(report, "\n".join(again[:2]), 0.25).stable
    for broken in ("", report.splitlines()[0], report.replace("p99 latency", "p98 latency")):
        with pytest.raises(ServerError, match=r"expected perf_analyzer's report .* tritonclient=="):
            parse(broken, "", 0.25)


def test_input_data_keeps_bytes_unchanged():
    items = (b"\xff\xd8 a picture", "naïve".encode())
    workload = Workload(model="clip_text", tensor="text", items=items, mix="")
    rows = json.loads(perf_analyzer.input_data(workload))["data"]
    content = [base64.b64decode(row["text"]["content"]["b64"]) for row in rows]
    assert [bytes(deserialize_bytes_tensor(part)[0]) for part in content] == list(items)


def test_missing_perf_analyzer_names_the_package(no_analyzer):
    with (
        pytest.raises(RunnerError, match=r"no perf_analyzer on PATH.*tritonclient==2\.50\.0"),
        open_perf_analyzer(),
    ):
        pass


@pytest.mark.parametrize("library", perf_analyzer.LIBRARIES)
def test_missing_library_names_the_package(library, monkeypatch, tmp_path):
    program = tmp_path / "perf_analyzer"
    says = f"{program}: error while loading shared libraries: {library}: cannot open shared object"
    program.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 127\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    hint = perf_analyzer.LIBRARIES[library].rpartition(" ")[2]
    with (
        pytest.raises(RunnerError, match=rf"requires the missing library {library}; .*{hint}"),
        open_perf_analyzer(),
    ):
        pass


def test_installed_perf_analyzer_names_its_missing_library(analyzer, monkeypatch):
    for name in perf_analyzer.LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            break
    else:
        pytest.skip("this system has both libraries of its own")
    monkeypatch.setattr(perf_analyzer, "_library", lambda name: None)
    with (
        pytest.raises(RunnerError, match=r"requires the missing library lib\S+; pip inst"),
        open_perf_analyzer(),
    ):
        pass


def test_failing_perf_analyzer_reports_status_and_stderr(monkeypatch, tmp_path):
    program = tmp_path / "perf_analyzer"
    program.write_text("#!/bin/sh\necho 'Illegal instruction' >&2\nexit 132\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with (
        pytest.raises(
            RunnerError, match=r"--version exited with 132: Illegal instruction; install .* python"
        ),
        open_perf_analyzer(),
    ):
        pass


def test_asyncio_and_perf_analyzer_agree(server, analyzer):
    ratios = []
    for _ in range(6):  # other processes may use the machine
        load = load_of(server, load=4, window_s=0.5)
        theirs, mine = analyzer.measure(load), AsyncClient().measure(load)
        ratios.append(mine.throughput_per_s / theirs.throughput_per_s)
        if 0.7 < ratios[-1] < 1.4:
            break
    assert 0.7 < ratios[-1] < 1.4, f"asyncio / perf_analyzer, each right after the other: {ratios}"


# Evaluation of points.


@pytest.mark.parametrize(
    ("throughputs", "latencies", "expected"),
    [
        ([100, 105, 109], [10, 10.5, 10.9], True),
        ([100, 105, 111], [10, 10.5, 10.9], False),
        ([100, 105, 109], [10, 10.5, 11.1], False),
        ([0, 0, 1], [10, 10, 10], False),
    ],
)
def test_steady_compares_three_windows(throughputs, latencies, expected):
    assert steady(throughputs, latencies) is expected


@pytest.mark.parametrize(
    ("throughputs", "concurrency", "confirmed"),
    [
        ({1: 50, 2: 90, 4: 96, 8: 100, 16: 99}, 4, True),
        ({1: 50, 2: 94.9, 4: 95, 8: 100}, 4, True),
        ({1: 100, 2: 60, 4: 50}, 1, True),
        ({1: 10, 2: 20, 4: 40}, 4, False),
        ({16: 100, 1: 99}, 1, True),
        ({1: 7}, 1, False),
    ],
)
def test_saturation_is_the_lowest_concurrency_near_the_peak(throughputs, concurrency, confirmed):
    points = [point(float(load), value) for load, value in throughputs.items()]
    found = saturation_of([*points, point(90.0, 1000.0, mode="rate")])
    assert (found.concurrency, found.confirmed) == (concurrency, confirmed)
    assert found.throughput_per_s == throughputs[concurrency]


def test_no_saturation_without_concurrency_points():
    assert saturation_of([point(90.0, 100.0, mode="rate")]) is None


@pytest.mark.parametrize(
    ("asyncio", "ratio", "agrees"),
    [((110.0, 300.0, 114.0), 1.14, True), ((60.0, 84.0, 108.0), 0.84, False)],
)
def test_agreement_compares_medians(asyncio, ratio, agrees):
    theirs = (120.0, 100.0, 30.0)
    sweep = Sweep(model="clip_image", wire="grpc", concurrency=(8,))
    found = agreement_of(sweep, 8, perf_analyzer=theirs, asyncio=asyncio)
    assert (found.ratio, found.agrees) == (pytest.approx(ratio), agrees)


def test_plans_cover_both_models_and_protocols():
    full, quick = Plan.full(), Plan.quick()
    pairs = {("clip_image", "grpc"), ("clip_image", "http"), ("clip_text", "grpc")}
    pairs |= {("clip_text", "http")}
    assert {(s.model, s.wire) for s in full.sweeps} == pairs
    assert {(s.model, s.wire) for s in quick.sweeps} == pairs
    assert {s.concurrency for s in full.sweeps} == {(1, 2, 4, 8, 16, 32, 64)}
    assert {s.concurrency for s in Plan.quick([4, 2, 4]).sweeps} == {(2, 4)}


# End to end.


def test_embedded_server_is_measured(fp32_bundle, tmp_path):
    repository = tmp_path / "repository"
    plan = plan_of(
        Sweep(model="clip_image", wire="grpc", concurrency=(1, 4), rates=(0.5,)),
        Sweep(model="clip_text", wire="http", concurrency=(2,)),
    )
    report = measure_embedded(fp32_bundle, plan, repository, "onnxruntime:fp32", silent)
    main = "asyncio" if report.perf_analyzer is None else "perf_analyzer"
    mine = [(p.model, p.protocol, p.mode) for p in report.points if p.client == main]
    image, text = ("clip_image", "grpc"), ("clip_text", "http")
    assert mine == [
        *([(*image, "concurrency")] * 2),
        (*image, "rate"),
        (*text, "concurrency"),
    ]
    assert [(s.model, s.protocol) for s in report.saturation] == [image, text]
    rate = next(p.load for p in report.points if p.mode == "rate")
    assert rate == pytest.approx(report.saturation[0].throughput_per_s / 2, abs=0.1)
    for measured in report.points:
        assert [step.model for step in measured.steps] == list(STEPS[measured.model])
        assert measured.errors == measured.cache_hits == 0
    assert not any("response_cache" in f.read_text() for f in repository.glob("*/config.pbtxt"))
    assert report.runners == {"image": "onnxruntime:fp32", "text": "onnxruntime:fp32"}
    assert set(report.mix) == {"clip_image", "clip_text"}
    assert len(report.agreement) == (2 if main == "perf_analyzer" else 0)
    for pair in report.agreement:
        assert len(pair.perf_analyzer_per_s) == len(pair.asyncio_per_s) == 3
    eager = report.against_eager
    assert eager.largest_difference < 1e-4
    assert eager.speedup == pytest.approx(eager.served_per_s / eager.eager_per_s, rel=1e-6)


def test_running_server_is_measured_without_perf_analyzer(server, fp32_bundle, no_analyzer):
    plan = plan_of(
        Sweep(model="clip_text", wire="grpc", concurrency=(2, 4)),
        Sweep(model="clip_text", wire="http", concurrency=(2,)),
    )
    report = measure_running(fp32_bundle, plan, {"grpc": server.grpc_url}, silent, server.admin_key)
    assert [(p.client, p.protocol) for p in report.points] == [("asyncio", "grpc")] * 2
    assert report.perf_analyzer is None
    assert [left.what for left in report.left_out] == ["perf_analyzer"]
    assert "tritonclient==2.50.0" in report.left_out[0].reason
    assert report.agreement == ()
    assert report.shares_machine
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(load_table(report), *load_remarks(report), sep="\n", markup=False)
    told = console.export_text()
    assert "clip_text grpc" in told
    assert f"{report.points[0].throughput_per_s:.1f}" in told
    assert "left out: perf_analyzer: no perf_analyzer on PATH" in told
    assert [p.cache_hits for p in report.points] == [0, 0]  # though the cache is on


def test_response_cache_hits_are_counted(server, fp32_bundle):
    texts = mixed_texts(fp32_bundle, seed=77, count=4)
    statistics = Statistics(server.grpc_url, server.admin_key)
    before = statistics.at_rest()
    AsyncClient().measure(load_of(server, workload=texts))
    found = counted("clip_text", before, statistics.at_rest())
    assert found.cache_hits > 0
    assert 4 <= found.steps[0].requests <= 8  # two equal requests in flight may both miss


def test_load_with_errors_falls_back_to_the_asyncio_client(
    server, analyzer, fp32_bundle, monkeypatch
):
    monkeypatch.setattr(measure, "mixed_pictures", corrupt)
    plan = plan_of(Sweep(model="clip_image", wire="grpc", concurrency=(2,)))
    report = measure_running(fp32_bundle, plan, {"grpc": server.grpc_url}, silent, server.admin_key)
    (only,) = report.points
    assert only.client == "asyncio"
    assert only.errors > 0
    (left,) = report.left_out
    assert left.what == "clip_image over grpc, 2 in flight, perf_analyzer"
    assert "one of JPEG" in left.reason


def test_load_of_other_clients_is_detected(server, monkeypatch):
    monkeypatch.setattr("benchmarks.load.step_times._REST_S", 0.4)
    monkeypatch.setattr("benchmarks.load.step_times._REST_WITHIN_S", 0.8)

    async def both() -> None:
        load = load_of(server, load=8, window_s=1.5)
        noise = asyncio.create_task(AsyncClient()._measure(load))
        await asyncio.sleep(0.5)
        with pytest.raises(ServerError, match=r"were not stable .* other clients"):
            await asyncio.to_thread(Statistics(server.grpc_url, server.admin_key).at_rest)
        await noise

    asyncio.run(both())


def test_server_with_another_model_is_rejected(server, tiny_bundle, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.load.against_eager.EagerRunner.run",
        lambda self, batch: np.zeros((len(batch), 7)),
    )
    with pytest.raises(ServerError, match=r"another model .* have 32 dimensions, not 7"):
        against_eager(tiny_bundle, server.grpc_url, 32, 3, silent, runner=None)


@pytest.mark.parametrize(
    ("grpc", "http"), [("http://localhost:8000", None), (None, "localhost:8000")]
)
def test_urls_of_the_wrong_protocol_are_rejected(grpc, http):
    with pytest.raises(InputError, match=r"expected (grpc|http)://host:port of a running server"):
        urls_of(grpc, http)


def test_load_command_writes_results_and_json(
    server, fp32_bundle, no_analyzer, monkeypatch, tmp_path, capsys
):
    plan = plan_of(Sweep(model="clip_image", wire="http", concurrency=(1,)))
    monkeypatch.setattr(Plan, "quick", lambda concurrency: plan)
    command.load(
        fp32_bundle.path,
        quick=True,
        http_url=server.http_url,
        admin_key=server.admin_key,
        output=tmp_path / "new",
        as_json=True,
    )
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = Results.read(tmp_path / "new").load
    assert document["points"][0]["throughput_per_s"] == pytest.approx(
        kept.points[0].throughput_per_s, rel=1e-4
    )
    assert next(iter(document)) == "environment"
    assert {"points", "saturation", "against_eager", "agreement", "left_out"} <= set(document)
    (only,) = document["points"]
    numbers = {"load", "throughput_per_s", "p50_ms", "p95_ms", "p99_ms", "errors", "stable"}
    assert {"client", "protocol", "model", "mode", "steps", *numbers} <= set(only)
    assert set(document["saturation"][0]) >= {"model", "protocol", "concurrency"}
    assert only["steps"][1]["model"] == "image_tower"
