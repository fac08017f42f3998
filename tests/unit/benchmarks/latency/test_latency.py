"""`python -m benchmarks latency` on a tiny model, in real runs."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.latency.candidates import WORKS, Work, batch_of
from benchmarks.latency.record import PARTIAL
from benchmarks.latency.test_stages import caption
from benchmarks.report.analysis import of, works
from export.checkpoints.load import load_checkpoint
from serving.inputs.tokenizer import Tokenizer
from serving.util.nvidia import gpu
from serving.util.results import Results

SHORT = WORKS["cpu", "short"]


@pytest.fixture(scope="module")
def run(measured):
    """The latency run of `measured`."""
    (only,) = Results.read(measured).latency
    return only


def test_every_runner_is_timed_in_turns_with_eager(run):
    assert works(run) == sorted(
        {(w.tower, w.batch, w.length) for w in SHORT}, key=lambda w: (w[0], w[2] or 0, w[1])
    )
    assert (run.device, run.matrix, run.reference) == ("cpu", "short", "eager:fp32")
    for work in works(run):
        found = {one.runner: one for one in of(run, work)}
        expected = {"eager:fp32", "onnxruntime:fp32", "transformers:fp32", "onnxruntime-plain:fp32"}
        assert set(found) == expected | ({"transformers-longest:fp32"} if work[2] else set())
        for one in found.values():
            assert len(one.ratios) >= 5
            assert one.timing.rounds % len(one.ratios) == 0
            low, high = one.timing.quartiles
            assert 0 < low <= one.timing.milliseconds <= high
            assert one.device_timing is None
            assert one.cosine > 0.9999  # all of them compute the same embeddings
            medians = one.reference_ms / one.timing.milliseconds
            assert medians / 3 < one.ratio < 3 * medians
            padded = one.runner not in ("onnxruntime:fp32", "transformers-longest:fp32")
            assert one.length_run == (77 if work[2] and padded else work[2])


def test_record_names_the_machine_and_the_model(run, tiny_bundle):
    where = run.environment
    assert where.cpu.usable >= 1
    assert where.cpu.flags
    assert where.libraries["torch"]
    assert where.commit is None or re.match("[0-9a-f]{40}", where.commit)
    manifest = tiny_bundle.manifest
    assert run.model.weights_sha256 == manifest.provenance.weights_sha256
    assert (run.model.name, run.model.architecture) == (manifest.name, manifest.architecture)
    for limits in (run.limits, run.limits_at_end):
        assert set(limits.matmul_tflops) | set(limits.without) >= {"fp32", "bf16", "int8"}
        assert limits.copy_gb_per_s > 0
    assert [one.what for one in run.left_out] == ["image tower, transformers-longest:fp32"]


def test_stages_and_footprints_are_measured(run):
    stages = {one.stage for one in run.stages}
    assert {"image: decode", "image: together", "text: transformers longest"} <= stages
    found = {one.runner: one for one in run.footprints}
    assert set(found) == {"eager:fp32", "onnxruntime:fp32", "transformers:fp32"}
    for one in found.values():
        assert 0 < one.before_bytes < one.loaded_bytes <= one.peak_bytes
        assert 0 < one.load_s < one.total_s
    # PyTorch alone needs more memory than this model with ONNX Runtime.
    assert found["eager:fp32"].peak_bytes > found["onnxruntime:fp32"].peak_bytes


def test_checkpoint_without_export_is_timed_by_pytorch_runners(
    run_benchmarks, tiny_checkpoint, tmp_path
):
    """Other runners are left out with the reason, and the old section is kept."""
    patterns = ("--runner=eager:*", "--runner=onnxruntime:fp32")
    done = run_benchmarks(
        *("latency", tiny_checkpoint, "--budget=0.05", "--output", tmp_path, "--json"), *patterns
    )
    assert done.returncode == 0, done.stderr
    (run,) = Results.read(tmp_path).latency
    assert {one.runner for one in run.towers} == {"eager:fp32"}
    assert json.loads(done.stdout.splitlines()[-1])["model"]["name"] == "tiny-clip"
    reasons = {one.what: one.reason for one in run.left_out}
    assert "runs graphs of a bundle" in reasons["image tower, onnxruntime:fp32"]
    assert "requires a bundle" in reasons["stages"]
    assert not (tmp_path / PARTIAL).exists()


def test_run_that_is_out_of_time_before_a_result_writes_nothing(
    run_benchmarks, tiny_checkpoint, tmp_path
):
    options = ("--budget=0.05", "--runner=eager:fp32", "--stop-after=0.001")
    done = run_benchmarks("latency", tiny_checkpoint, *options, "--output", tmp_path)
    assert done.returncode == 2
    assert "nothing was measured" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_the_old_results(run_benchmarks, tmp_path):
    (tmp_path / "results.json").write_text("old")
    done = run_benchmarks("latency", tmp_path, "--output", tmp_path)
    assert done.returncode == 2
    assert "nothing was measured" in done.stderr
    assert "config.json" in done.stderr  # a file that a checkpoint would have
    assert (tmp_path / "results.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(gpu() is not None, reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_reported(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "latency", "--device", "cuda"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "expected a machine with an NVIDIA GPU; this one has none" in done.stderr
    assert "--device cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(gpu() is None, reason="no NVIDIA GPU")
def test_rows_have_both_times_on_a_gpu(run_benchmarks, tiny_checkpoint, tmp_path):
    options = ("--device=cuda", "--budget=0.05", "--runner=eager*", "--output", tmp_path)
    done = run_benchmarks("latency", tiny_checkpoint, *options)
    assert done.returncode == 0, done.stderr
    (run,) = Results.read(tmp_path).latency
    names = {one.runner for one in run.towers}
    assert names == {"eager:fp32"} | {
        f"eager-cuda:{precision}" for precision in ("fp32", "tf32", "fp16", "bf16")
    }
    for one in run.towers:
        assert (one.device_timing is not None) == (one.runner != "eager:fp32")
    assert set(run.limits.matmul_tflops) >= {"fp32", "tf32", "fp16"}


def test_short_and_padded_batches_hold_the_same_texts(tiny_checkpoint):
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    work = Work(tower="text", batch=4, length=9)
    cut, full = batch_of(checkpoint, work), batch_of(checkpoint, work, padded=True)
    assert cut.shape == (4, 9)
    assert full.shape == (4, 77)
    assert np.array_equal(cut, full[:, :9])
    assert (full[:, 9:] == checkpoint.text.pad_id).all()
    assert (cut[:, -1] == checkpoint.text.end_id).all()


@pytest.mark.parametrize(("context_length", "longest"), [(8, 7), (32, 10), (77, 10)])
def test_captions_are_truncated_to_the_context_length(tiny_bundle, context_length, longest):
    spec = replace(tiny_bundle.manifest.text, context_length=context_length)
    tokenizer = Tokenizer(tiny_bundle.tokenizer, spec)
    captions = [caption(tokenizer, context_length, number) for number in range(8)]
    assert max(map(len, tokenizer.encode(captions))) == longest


def test_no_partial_file_is_left(measured):
    assert [path.name for path in Path(measured).iterdir()] == ["results.json"]
