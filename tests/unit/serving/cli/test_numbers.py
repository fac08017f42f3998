"""Numbers of options: finite in float32, and at most int32, for every command of every program."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import typer

import benchmarks.__main__
import training.__main__
from benchmarks.report.compare import compare
from export.cli.clip_deploy import app
from serving.bulk.job import bulk_embed
from serving.bulk.ray_pool import Resources
from serving.bundles.identity import ModelIdentity
from serving.cli import console
from serving.clients.endpoint import attach
from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import InputError
from serving.search.query import Term, query_vector
from serving.tasks.rank import Category, caption
from serving.tasks.zero_shot import ZeroShotClassifier
from serving.triton.server import TritonServer
from tests.support.paths import CHECKOUT
from training.contrastive import Settings

PROGRAMS = {
    "clip-deploy": app,
    "benchmarks": benchmarks.__main__.app,
    "training": training.__main__.app,
}
FLOATS = ("nan", "inf", "-inf", "1e39", "-1e39")
NOBODY = "grpc://127.0.0.1:9"


def callbacks(app: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Every command of an application, with the function that it runs."""
    for command in app.registered_commands:
        yield (*path, command.name or command.callback.__name__), command.callback
    for group in app.registered_groups:
        yield from callbacks(group.typer_instance, (*path, group.name))


def numeric(kind: type) -> list[tuple[str, tuple[str, ...], str, list[str]]]:
    """Program, command, option, and values for its arguments, of all options of a type."""
    found = []
    for program, application in PROGRAMS.items():
        for path, callback in callbacks(application):
            parameters = inspect.signature(callback).parameters
            notes = inspect.get_annotations(callback, eval_str=True)
            arguments = ["x" for n in notes.values() if is_argument(n)]
            found += [
                (program, path, option(name, notes[name]), arguments)
                for name in parameters
                if kind in kinds(notes[name]) and not is_argument(notes[name])
            ]
    return found


def kinds(annotation) -> set[object]:
    inner = set(get_args(annotation)) or {annotation}
    return inner | {below for some in inner if some != annotation for below in kinds(some)}


def is_argument(annotation) -> bool:
    return any(type(note).__name__ == "ArgumentInfo" for note in get_args(annotation))


def option(name: str, annotation) -> str:
    infos = [n for n in get_args(annotation) if type(n).__name__ == "OptionInfo"]
    given = [d for info in infos for d in info.param_decls or () if d.startswith("--")]
    return given[0] if given else "--" + name.replace("_", "-")


def exit_code(program, path, *arguments, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", [program, *path, *arguments])
    with pytest.raises(SystemExit) as ended:
        console.run(PROGRAMS[program])
    return ended.value.code


def test_options_are_found():
    floats = {(path, option) for _, path, option, _ in numeric(float)}
    assert (("search", "query"), "--weight") in floats
    assert (("caption",), "--threshold") in floats
    assert (("latency",), "--budget") in floats
    assert (("folder",), "--learning-rate") in floats
    assert len(floats) == 8
    assert len(numeric(int)) > 25


@pytest.mark.parametrize("kind", [float, int])
def test_number_out_of_range_is_a_usage_error(kind, monkeypatch, capsys):
    for program, path, name, arguments in numeric(kind):
        for value in FLOATS if kind is float else (str(2**31), str(10**30)):
            code = exit_code(program, path, *arguments, f"{name}={value}", monkeypatch=monkeypatch)
            told = " ".join(capsys.readouterr().err.split())
            assert code == 2, (path, name, value)
            assert "Invalid value" in told, (path, name, value, told)
            assert name in told, (path, name, value, told)


# ------------------------------------------------------------------------- Python interface


def refused(call: Callable[[], object]) -> InputError:
    with pytest.raises(InputError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("timeout", [math.nan, math.inf, 0, -1])
def test_timeouts_are_positive_and_finite(timeout, tmp_path):
    assert refused(lambda: ClipClient(NOBODY, timeout=timeout)).name == "timeout"
    assert refused(lambda: attach(NOBODY, timeout)).name == "timeout"
    assert refused(lambda: TritonServer(tmp_path, ready_timeout=timeout)).name == "ready_timeout"


@pytest.mark.parametrize("count", [0, -1, 2**31])
def test_counts_are_positive(count, tmp_path):
    for name in ("batch_size", "in_flight", "attempts"):
        assert refused(lambda n=name: ClipClient(NOBODY, **{n: count})).name == name
    assert refused(lambda: LocalClip(tmp_path, batch_size=count)).name == "batch_size"
    for name in ("workers", "threads"):
        assert refused(lambda n=name: Resources(**{n: count})).name == name
    for name in ("batch_size", "shard_size"):
        error = refused(lambda n=name: bulk_embed("x", tmp_path, tmp_path, **{n: count}))
        assert error.name == name


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
def test_other_numbers_are_finite(number):
    assert refused(lambda: Resources(gpus=number)).name == "gpus"
    results = CHECKOUT / "benchmarks" / "results" / "epyc-2cpu-avx2"
    assert refused(lambda: compare(results, results, number)).name == "threshold"
    sound = Settings(steps=1, batch_size=2, learning_rate=1e-3, warmup_steps=1)
    for name in ("learning_rate", "weight_decay", "clip_norm"):
        assert refused(lambda n=name: replace(sound, **{n: number})).name == name


class Embedder:
    """Embeds every text and image as a different unit vector."""

    logit_scale, templates = 100.0, ("{}",)
    identity = ModelIdentity(name="one-hot", weights_sha256="0" * 64, embed_dim=8)

    def embed_texts(self, texts, *, truncate=False):
        return np.eye(8, dtype=np.float32)[: len(texts)]

    embed_images = embed_texts


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e39, 0.0])
def test_weight_of_a_term_is_finite_in_float32(weight):
    terms = [Term(text="a", weight=weight), Term(text="b")]
    assert "weight" in refused(lambda: query_vector(Embedder(), terms)).reason.lower()


@pytest.mark.parametrize("scale", [1e-38, 1.0, 3e38])
def test_only_the_ratio_of_weights_matters(scale):
    terms = [Term(text="a", weight=scale), Term(text="b", weight=0.5 * scale)]
    direction = np.array([1, 0.5]) / np.hypot(1, 0.5)
    np.testing.assert_allclose(query_vector(Embedder(), terms)[:2], direction, rtol=1e-6)


@pytest.mark.parametrize("threshold", [math.nan, -0.1, 1.1, math.inf])
def test_threshold_of_a_caption_is_a_probability(threshold):
    vocabulary = [Category(name="color", words=("red", "green"))]
    refused(lambda: caption(Embedder(), [b""], vocabulary, threshold=threshold))


def test_saved_classifier_with_a_number_that_is_not_finite_is_refused(tmp_path):
    classifier = ZeroShotClassifier(Embedder(), ["cat", "dog"])
    classifier.embeddings[1, 3] = math.nan
    classifier.save(tmp_path / "pets.npz")
    error = refused(lambda: ZeroShotClassifier.load(tmp_path / "pets.npz", Embedder()))
    assert "finite" in error.reason.lower()
