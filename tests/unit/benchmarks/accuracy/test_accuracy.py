"""Accuracy compared with transformers' own predictions, intervals with published tables, and
directories."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy.intervals import paired_difference, wilson
from benchmarks.accuracy.labelled import read_folder
from benchmarks.accuracy.measure import METHODS, accuracy
from benchmarks.report.tables import accuracy_remarks, accuracy_table
from serving.bundles.bundle import Bundle
from serving.errors import InputError, RunnerError, TextError, TextTooLongError
from serving.util.progress import silent
from serving.util.results import Results

LABELS = ["cat", "red bus", "owl", "very old house", "number 7", "naïve café", "sea", "teapot"]
LABELS += ["man on a horse", "snow", "pair of blue shoes", "map"]
TEMPLATES = ["a photo of a {}.", "{}", "a drawing of the {} in a very long line of words"]
COUNT = 72


def draw(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    grid = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
    return grid.resize((50, 40), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint):
    """transformers' scores, float [COUNT, LABELS], of the drawings."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(tiny_checkpoint).eval()
    processor = CLIPImageProcessorPil.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    pixels = processor([draw(n) for n in range(COUNT)], return_tensors="pt")["pixel_values"]
    texts = [template.replace("{}", label) for label in LABELS for template in TEMPLATES]
    tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.inference_mode():
        images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        every = model.text_projection(model.text_model(**tokens).pooler_output)
    images = images / images.norm(dim=-1, keepdim=True)
    every = every / every.norm(dim=-1, keepdim=True)
    labels = every.view(len(LABELS), len(TEMPLATES), -1).mean(dim=1)
    return (images @ (labels / labels.norm(dim=-1, keepdim=True)).T).numpy()


@pytest.fixture(scope="module")
def truth(theirs):
    """Labels for which the model is right three times out of four: its own choice, some of them
    shifted."""
    chosen = theirs.argmax(axis=1)
    return np.where(np.arange(COUNT) % 4 == 3, (chosen + 1) % len(LABELS), chosen)


@pytest.fixture(scope="module")
def folder(truth, tmp_path_factory) -> Path:
    """An ImageFolder directory: names differ from labels, and one label has no image."""
    path = tmp_path_factory.mktemp("labelled") / "numbers"
    path.mkdir()
    lines = [f"n{n:04d}, {label}\n" for n, label in enumerate(LABELS)]
    (path / "classnames.txt").write_text("".join(lines))
    for n, label in enumerate(truth):
        inside = path / f"n{label:04d}" / "deeper"
        inside.mkdir(parents=True, exist_ok=True)
        draw(n).save(inside / f"{n:03d}.PNG")  # lossless: transformers reads the same pixels
    return path


@pytest.fixture(scope="module")
def measured(tiny_bundle, folder):
    return accuracy(tiny_bundle, folder, silent, templates=TEMPLATES)


def row(result, name):
    return next(row for row in result.rows if row.runner == name)


# ------------------------------------------------------------------ accuracy


def test_float32_predicts_what_transformers_predicts(measured, theirs, truth):
    order = np.argsort(-theirs, axis=1, kind="stable")
    # The test would prove little if the model predicted nearly the same label for all images.
    assert np.sort(np.bincount(order[:, 0]))[-2] > COUNT / 8
    gaps = -np.diff(-np.sort(-theirs, axis=1), axis=1)
    assert gaps[:, 0].min() > 1e-6  # no image near a decision boundary
    for name in ("eager:fp32", "onnxruntime:fp32", "openvino:fp32"):
        got = row(measured, name)
        assert got.top1 == (order[:, 0] == truth).mean() == 0.75
        assert got.top5 == (order[:, :5] == truth[:, None]).any(axis=1).mean()
        assert (got.agreement, got.difference) == (1, 0)


def test_every_runner_of_the_bundle_has_a_row(measured):
    names = [row.runner for row in measured.rows]
    assert names[0] == "eager:fp32"
    assert {"onnxruntime:fp16", "onnxruntime:int8", "openvino:fp16", "openvino:int8"} < set(names)
    assert len(set(names)) == len(names)
    assert "openvino:bf16" in {
        *names,
        *(one.what for one in measured.left_out),
    }  # not every CPU supports it
    assert (measured.images, measured.labels) == (COUNT, 12)
    assert measured.templates == tuple(TEMPLATES)
    assert (measured.image_batch, measured.text_batch) == (32, 32)
    for got in measured.rows:
        assert got.image_ms > 0
        assert got.text_ms > 0
        assert got.top1_low < got.top1 < got.top1_high
        assert got.difference_low <= got.difference <= got.difference_high
        assert got.difference == pytest.approx(got.top1 - measured.rows[0].top1)


def test_gate_verdict_requires_both_towers(tiny_bundle, folder):
    def refused(artifact):
        if artifact.tower != "text":
            return artifact
        verdicts = tuple(
            replace(v, passed=v.passed and v.runner != "openvino:fp32") for v in artifact.verdicts
        )
        return replace(artifact, verdicts=verdicts)

    artifacts = tuple(refused(artifact) for artifact in tiny_bundle.manifest.artifacts)
    bundle = Bundle(tiny_bundle.path, replace(tiny_bundle.manifest, artifacts=artifacts))
    got = accuracy(bundle, folder, silent, patterns=["*:fp32"], limit=8)
    passed = {row.runner: row.passed for row in got.rows}
    assert passed == {"eager:fp32": None, "onnxruntime:fp32": True, "openvino:fp32": False}
    shown = render(got)
    assert "failed" in shown
    assert "passed" in shown


def test_captions_and_labels_files_are_read(fp32_bundle, folder, truth, theirs, tmp_path):
    lines = []
    for file in sorted(folder.rglob("*.PNG")):
        shutil.copy(file, tmp_path / file.name)
        lines.append(f"{file.name}, {LABELS[truth[int(file.stem)]]}\n")
    draw(500).save(tmp_path / "two.png")
    lines.append("two.png, a number and a number\n")
    (tmp_path / "captions.txt").write_text("".join(lines))
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    got = accuracy(fp32_bundle, tmp_path, silent, templates=TEMPLATES, patterns=["onnx*"])
    assert [row.runner for row in got.rows] == ["eager:fp32", "onnxruntime:fp32"]
    assert [row.top1 for row in got.rows] == [0.75, 0.75]
    assert got.images == COUNT
    assert "left out 1 images whose caption is not a label" in got.notes


def test_unreadable_images_are_named_and_left_out(fp32_bundle, folder, truth, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    first = sorted((tmp_path / "data").rglob("*.PNG"))[0]
    (first.parent / "000.jpg").write_bytes(b"no picture")
    (first.parent / "zzz.jpg").write_bytes(b"")
    got = accuracy(
        fp32_bundle, tmp_path / "data", silent, templates=TEMPLATES, patterns=["onnxruntime:fp32"]
    )
    assert got.images == COUNT
    assert got.rows[0].top1 == 0.75  # the other images keep their labels
    for reason, name in zip(got.skipped, ("000.jpg", "zzz.jpg"), strict=True):
        assert reason.startswith(str(first.parent / name))
    assert list(accuracy_remarks(got))[-1] == "skipped 2 images that cannot be read"


def test_limit_takes_images_of_all_labels(fp32_bundle, tmp_path):
    for label in range(4):
        (tmp_path / f"label {label}").mkdir()
        for n in range(6):
            draw(10 * label + n).save(tmp_path / f"label {label}" / f"{n}.png")
    got = accuracy(fp32_bundle, tmp_path, silent, patterns=["onnxruntime:fp32"], limit=4)
    assert got.images == got.image_batch == 4
    assert got.rows[0].top5 is None  # top-5 of four labels is meaningless
    assert "│      - │" in render(got)


def test_earlier_of_two_equal_names_is_predicted(fp32_bundle, tmp_path):
    """OpenAI's ImageNet names contain `missile` and `sunglasses` twice."""
    names = [f"thing {n}" for n in range(10)]
    names[7] = names[2]
    (tmp_path / "classnames.txt").write_text("".join(f"{n}, {x}\n" for n, x in enumerate(names)))
    for n in range(40):
        (tmp_path / str(n % 10)).mkdir(exist_ok=True)
        draw(n).save(tmp_path / str(n % 10) / f"{n}.png")
    got = accuracy(fp32_bundle, tmp_path, silent)
    assert "1 labels repeat the name of an earlier label; the earlier one is predicted" in got.notes
    assert {row.agreement for row in got.rows} == {
        1
    }  # a tie that is broken by noise would show here


def test_runner_with_non_finite_embeddings_is_left_out(fp32_bundle, folder, monkeypatch):
    from serving.runners.onnx_runtime import OnnxRuntimeRunner

    infer = OnnxRuntimeRunner._infer

    def broken(self, batch):
        return infer(self, batch) * (np.nan if batch.dtype == np.uint8 else 1)

    monkeypatch.setattr(OnnxRuntimeRunner, "_infer", broken)
    got = accuracy(fp32_bundle, folder, silent, limit=20)
    assert [one.what for one in got.left_out] == ["onnxruntime:fp32"]
    assert "not finite" in got.left_out[0].reason
    assert "onnxruntime:fp32" not in {one.runner for one in got.rows}


def test_a_runner_that_fails_is_left_out_and_named(fp32_bundle, folder, monkeypatch):
    from serving.runners.onnx_runtime import OnnxRuntimeRunner

    def refuse(self, batch):
        raise ValueError("out of something")

    monkeypatch.setattr(OnnxRuntimeRunner, "_infer", refuse)
    got = accuracy(fp32_bundle, folder, silent, limit=8)
    assert "onnxruntime:fp32" not in {row.runner for row in got.rows}
    (left,) = got.left_out
    assert left.what == "onnxruntime:fp32"
    assert "out of something" in left.reason
    assert any(one.startswith("left out: onnxruntime:fp32: ") for one in accuracy_remarks(got))


def test_random_weights_are_reported_as_chance(fp32_bundle, folder):
    provenance = replace(fp32_bundle.manifest.provenance, weights="random")
    bundle = Bundle(fp32_bundle.path, replace(fp32_bundle.manifest, provenance=provenance))
    got = accuracy(bundle, folder, silent, patterns=["eager:fp32"], limit=8)
    assert "the weights are random: the accuracy is that of guessing" in got.notes[0]


# ------------------------------------------------------------------ intervals


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_table(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=5.1e-5)
    assert wilson(count - right, count) == pytest.approx((1 - high, 1 - low), abs=5.1e-5)


@pytest.mark.parametrize(
    ("gained", "lost", "count", "low", "high"),
    [  # Fagerland, Lydersen, Laake: Statistical Analysis of Contingency Tables, chapter 8
        (6, 16, 161, -0.1240, -0.0054),
        (1, 7, 21, -0.517, -0.026),
    ],
)
def test_tango_interval_equals_published_table(gained, lost, count, low, high):
    places = 5.1e-5 if count == 161 else 5.1e-4
    assert paired_difference(gained, lost, count) == pytest.approx((low, high), abs=places)
    turned = paired_difference(lost, gained, count)
    assert turned == pytest.approx((-high, -low), abs=places)


def test_interval_of_zero_observed_difference_is_not_empty():
    z2 = 1.959964**2
    low, high = paired_difference(0, 0, 1000)
    assert (low, high) == pytest.approx((-z2 / (1000 + z2), z2 / (1000 + z2)), rel=1e-4)


@pytest.mark.parametrize("pair", [(0, 5), (5, 0), (5, 5), (3, 1), (0, 1)])
def test_interval_limits_satisfy_the_score_statistic(pair):
    """Compute the score statistic with a numeric search for the nuisance parameter, not Tango's
    formula."""
    gained, lost, count = *pair, 5 if pair == (0, 5) else 12
    for delta in paired_difference(gained, lost, count):
        if abs(delta) > 1 - 1e-9:
            continue
        # P(lost) such that P(gained) = P(lost) + delta and both and their sum are probabilities
        q = np.linspace(max(0, -delta), (1 - delta) / 2, 400_001)[1:-1]
        p, rest = q + delta, 1 - 2 * q - delta
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [
                n * np.log(x) if n else 0 * x
                for n, x in ((gained, p), (lost, q), (count - gained - lost, rest))
            ]
        best = q[np.nanargmax(sum(parts))]
        variance = count * (2 * best + delta - delta**2)
        z = abs(gained - lost - count * delta) / math.sqrt(variance)
        assert z == pytest.approx(1.959964, rel=1e-3)


# ------------------------------------------------------------------ directories


def test_directories_are_read_as_torchvision_reads_them(tmp_path):
    for name in ("b cat/one.jpg", "a dog/two.jpeg", "a dog/three.png", ".cache/four.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        draw(1).save(tmp_path / name)
    (tmp_path / "an owl").mkdir()
    draw(1).save(tmp_path / "loose.png")
    got = read_folder(tmp_path)
    assert got.labels == ["a dog", "an owl", "b cat"]
    found = {file.name: got.labels[n] for file, n in zip(got.files, got.truth, strict=True)}
    assert found == {"one.jpg": "b cat", "two.jpeg": "a dog", "three.png": "a dog"}
    assert got.notes == [
        "left out 1 images that are in no label's directory",
        "1 labels have no image but can still be predicted, such as 'an owl'",
    ]


def test_classnames_give_names_and_order(tmp_path):
    for name in ("0", "1", "10"):
        (tmp_path / name).mkdir()
        draw(1).save(tmp_path / name / "x.jpg")
    assert read_folder(tmp_path).notes == [
        "directories are named by numbers or WordNet ids; list class names in classnames.txt"
    ]
    (tmp_path / "classnames.txt").write_text("10, tench, a fish\n0, shark\n1, hen\n2, ant\n")
    got = read_folder(tmp_path)
    assert got.labels == ["tench, a fish", "shark", "hen", "ant"]
    found = {file.parent.name: n for file, n in zip(got.files, got.truth, strict=True)}
    assert found == {"10": 0, "0": 1, "1": 2}
    assert got.notes == ["1 labels have no image but can still be predicted, such as 'ant'"]


@pytest.mark.parametrize(
    ("classnames", "shown"),
    [
        ("0, hen\n", r"no name for 1 directories with images, such as '1'; add a line `1, name`"),
        ("0, hen\n1\n", "expected one `directory, name` per line, got '1'"),
        ("0, hen\n1, \n", "expected one `directory, name` per line, got '1,'"),
        ("0, hen\n1, owl\n0, ant\n", "directory '0' is listed more than once"),
    ],
)
def test_invalid_class_names_are_rejected(tmp_path, classnames, shown):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        draw(1).save(tmp_path / name / "x.jpg")
    (tmp_path / "classnames.txt").write_text(classnames)
    with pytest.raises(InputError, match=shown):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        (
            {"x.png": None},
            r"no subdirectories of images; expected .*/LABEL/\*\.jpg, or captions\.txt",
        ),
        ({"a/x.txt": "no image"}, "no images in"),
        ({"x.png": None, "captions.txt": "y.png, cat\n"}, "no image has one of the 1 labels"),
        (
            {"x.png": None, "captions.txt": "x.png, cat\n", "labels.txt": "cat\ndog\ncat\n"},
            "'cat' is listed more than once",
        ),
    ],
)
def test_invalid_directories_are_rejected(tmp_path, files, shown):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if content is None:
            draw(1).save(tmp_path / name)
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=shown):
        read_folder(tmp_path)


def test_directory_of_unreadable_images_is_rejected(fp32_bundle, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(
        InputError, match=r"none of the images can be read; the first error: .*x\.jpg"
    ):
        accuracy(fp32_bundle, tmp_path, silent, patterns=["eager:*"])


@pytest.mark.parametrize(
    ("options", "error", "shown"),
    [
        ({"templates": ["a photo"]}, TextError, r"template 'a photo' has no \{\}; put \{\} where"),
        (
            {"templates": ["word " * 90 + "{}"]},
            TextTooLongError,
            r"labels\[0\]: in prompt template 'word .* more than the model's 77",
        ),
        ({"patterns": ["openvino:fp7"]}, RunnerError, "no runner of .* matches 'openvino:fp7'; "),
    ],
)
def test_invalid_options_are_rejected(fp32_bundle, folder, options, error, shown):
    with pytest.raises(error, match=shown):
        accuracy(fp32_bundle, folder, silent, **options)


# ------------------------------------------------------------------ the command


def render(result) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=160)
    console.print(accuracy_table(result))
    return console.file.getvalue()


def test_the_table_shows_what_was_measured(measured):
    shown = render(measured)
    assert f"tiny-clip on numbers: {COUNT} images, 12 labels x 3 templates" in shown
    low, high = wilson(54, 72)
    assert f"75.00% [{100 * low:.1f}, {100 * high:.1f}]" in shown
    low, high = paired_difference(0, 0, 72)
    assert f"+0.00% [{100 * low:+.2f}, {100 * high:+.2f}]" in shown


def command(*arguments):
    line = [sys.executable, "-m", "benchmarks", "accuracy", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command_writes_one_document(fp32_bundle, folder, tmp_path):
    (tmp_path / "templates.txt").write_text("".join(f"{line}\n" for line in TEMPLATES))
    options = ["--runner", "onnxruntime:fp32", "--runner", "eager:*", "--limit", 24]
    options += ["--templates", tmp_path / "templates.txt", "--output", tmp_path / "new", "--json"]
    done = command(fp32_bundle.path, folder, *options)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert Results.read(tmp_path / "new").accuracy.images == 24
    assert document["bundle"] == "tiny-clip"
    assert document["weights"] == "trained"
    assert document["dataset"] == "numbers"
    assert document["environment"]["libraries"]["onnxruntime"]
    assert (document["images"], document["labels"]) == (24, 12)
    assert document["templates"] == TEMPLATES
    assert document["methods"] == METHODS
    assert [row["runner"] for row in document["rows"]] == ["eager:fp32", "onnxruntime:fp32"]
    expected = accuracy(
        fp32_bundle, folder, silent, templates=TEMPLATES, patterns=["onnxruntime:*"], limit=24
    )
    for got, want in zip(document["rows"], expected.rows, strict=True):
        timed = {"image_ms", "text_ms"}
        want = asdict(want)
        assert {k: got[k] for k in got if k not in timed} == {
            k: want[k] for k in want if k not in timed
        }


def test_the_command_shows_errors_without_a_traceback(fp32_bundle, tmp_path):
    done = command(fp32_bundle.path, tmp_path)
    assert done.returncode == 2
    assert "no images in" in done.stderr
    assert "Traceback" not in done.stderr
