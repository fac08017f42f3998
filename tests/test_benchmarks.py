"""The benchmarks run, compare the same work, and tell what they measured."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.latency import Work, batch_of, latency
from benchmarks.served import served
from serving.commands import silent


def test_every_runner_is_timed_on_the_same_items(tiny_bundle):
    works = [Work(tower="image", batch=2), Work(tower="text", batch=3, length=9)]
    timings = latency(tiny_bundle, works, 3, silent)
    for work in works:
        mine = [t for t in timings if t.work == str(work)]
        assert {t.runner for t in mine} >= {
            "eager:fp32",
            "onnxruntime:fp32",
            "onnxruntime:int8",
            "openvino:int8",
        }
        eager = next(t for t in mine if t.runner == "eager:fp32")
        assert eager.speedup == 1
        for timing in mine:
            assert timing.speedup == pytest.approx(eager.milliseconds / timing.milliseconds)


def test_short_and_padded_texts_are_the_same_texts(tiny_bundle):
    work = Work(tower="text", batch=4, length=9)
    cut, full = batch_of(tiny_bundle, work), batch_of(tiny_bundle, work, 77)
    assert cut.shape == (4, 9)
    assert full.shape == (4, 77)
    assert np.array_equal(cut, full[:, :9])
    assert (full[:, 9:] == tiny_bundle.manifest.text.pad_id).all()
    assert (cut[:, -1] == tiny_bundle.manifest.text.end_id).all()


def test_served_and_eager_see_the_same_pictures(tiny_bundle, tmp_path):
    result = served(tiny_bundle, tmp_path / "repository", 32, 3, silent, runner="onnxruntime:fp32")
    assert result.largest_difference < 1e-4
    assert result.speedup == pytest.approx(result.served_per_s / result.eager_per_s, rel=1e-6)


def test_command(tiny_bundle, tmp_path):
    output = tmp_path / "latency.json"
    command = [sys.executable, "-m", "benchmarks", "latency", str(tiny_bundle.path)]
    command += ["--batch", "1", "--texts", "2", "--rounds", "3", "--output", str(output), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads(output.read_text())
    assert {timing["work"] for timing in document["timings"]} == {"image 1", "text 2 x 16 tokens"}
