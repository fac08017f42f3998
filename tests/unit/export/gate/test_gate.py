"""The whole gate: accuracy on labeled images, every kind of artifact, and recorded verdicts."""

import itertools
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoints.load import load_checkpoint
from export.gate.datasets import load_data
from export.gate.parity import Expected, judge
from export.gate.torch_runners import CompiledRunner, EagerRunner, TorchScriptRunner
from export.gate.verify import judged, references, verify
from export.pipeline import Options, build
from export.precisions import Precision
from export.towers.clip import ImageTower, VisionTransformerConfig
from serving.bundles.bundle import Bundle
from serving.bundles.manifest import TOLERANCES
from serving.errors import BundleError, InputError, RunnerError
from serving.inputs.tokenizer import Tokenizer
from serving.runners.registry import open_runner
from serving.runners.spec import RunnerSpec
from serving.util.progress import silent
from tests.support.references import MEAN, STD, some_ids, some_pixels, unit

NOUNS = [f"number {n}" for n in range(60)]
ROLLED = 3  # number of the eight images that get a wrong label


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint, checkpoint, pictures) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings by transformers' CLIP of each image, by name, and of each of NOUNS."""
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(tiny_checkpoint).eval()
    processor = CLIPImageProcessorPil.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    files = sorted(pictures.iterdir())
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    texts = [t.replace("{}", noun) for noun in NOUNS for t in checkpoint.templates]
    tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.inference_mode():
        images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        every = model.text_projection(model.text_model(**tokens).pooler_output)
    every = every / every.norm(dim=-1, keepdim=True)
    labels = every.view(len(NOUNS), len(checkpoint.templates), -1).mean(1)
    return unit(images), unit(labels)


@pytest.fixture(scope="module")
def labels(theirs) -> tuple[str, str]:
    """The two of NOUNS that divide the images evenly and clearly, but not by a wide margin.

    An untrained model chooses the same noun of most pairs for every image.
    """
    images, nouns = theirs
    best, chosen = 1e-4, None
    for one, other in itertools.combinations(range(len(NOUNS)), 2):
        difference = nouns[one] - nouns[other]
        margins = images @ difference
        near = np.abs(margins).max() < 0.1 * np.linalg.norm(difference)
        if near and abs(np.sign(margins).sum()) <= 2 and np.abs(margins).min() > best:
            best, chosen = np.abs(margins).min(), (NOUNS[one], NOUNS[other])
    assert chosen is not None
    return chosen


@pytest.fixture(scope="module")
def chosen(theirs, labels, pictures) -> dict[str, str]:
    """The label that transformers' CLIP gives each image."""
    images, nouns = theirs
    nearest = (images @ nouns[[NOUNS.index(label) for label in labels]].T).argmax(1)
    names = sorted(file.name for file in pictures.iterdir())
    return {name: labels[index] for name, index in zip(names, nearest, strict=True)}


@pytest.fixture(scope="module")
def folder(chosen, labels, pictures, tmp_path_factory) -> Path:
    """Labeled images of which the checkpoint, run by transformers, gets all but ROLLED right."""
    path = Path(shutil.copytree(pictures, tmp_path_factory.mktemp("labelled") / "pictures"))
    truth = dict(chosen)
    for name in sorted(truth)[:ROLLED]:
        truth[name] = next(label for label in labels if label != truth[name])
    lines = [f"{name}, {label}" for name, label in truth.items()]
    (path / "captions.txt").write_text("\n".join(lines))
    (path / "labels.txt").write_text("\n".join(labels))
    return path


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, quick_build, folder, tmp_path_factory) -> Bundle:
    """Verdicts on labeled images for the precisions that the tiny bundle lacks."""
    output = tmp_path_factory.mktemp("gate") / "bundle"
    precisions = (Precision.INT8_DYNAMIC,)
    return quick_build(
        tiny_checkpoint, output, precisions=precisions, torchscript=True, labelled=folder
    )


@pytest.fixture(scope="module")
def expected(checkpoint, folder, bundle) -> dict[str, Expected]:
    data = load_data(
        checkpoint.image,
        Tokenizer(bundle.tokenizer, checkpoint.text),
        checkpoint.templates,
        checkpoint.text,
        labelled=folder,
        progress=silent,
    )
    return references(checkpoint, data, silent)


def verdicts(bundle: Bundle):
    return [(a, v) for a in bundle.manifest.artifacts for v in a.verdicts]


# Accuracy on labeled images


@pytest.mark.parametrize("tower", ["image", "text"])
def test_accuracy_equals_transformers(expected, chosen, labels, tower):
    found = expected[tower].labelled
    assert found.accuracy == (len(chosen) - ROLLED) / len(chosen)
    names = sorted(chosen)
    nearest = (found.images @ found.labels.T).argmax(1)
    assert [labels[index] for index in nearest] == [chosen[name] for name in names]


def test_every_verdict_has_its_accuracy(bundle, chosen):
    right = (len(chosen) - ROLLED) / len(chosen)
    for artifact, verdict in verdicts(bundle):
        if artifact.precision == "fp32" and not verdict.runner.endswith("bf16"):
            assert verdict.accuracy == right
            assert verdict.relative_accuracy == verdict.top1_agreement == 1
        assert verdict.relative_accuracy == pytest.approx(verdict.accuracy / right)
        assert 0 <= verdict.top1_agreement <= 1


class Wrong:
    """A runner with the name of a real one, whose embeddings are altered."""

    spec, name = RunnerSpec("onnxruntime", "int8"), "onnxruntime:int8"
    runtime_version = "of no use 1.0"

    def __init__(self, inner, change) -> None:
        self.inner, self.change = inner, change

    def run(self, batch):
        changed = self.change(self.inner.run(batch).astype(np.float64))
        return (changed / np.linalg.norm(changed, axis=1, keepdims=True)).astype(np.float32)


def judge_changed(checkpoint, expected, change):
    with EagerRunner(checkpoint.clip.image) as eager:
        return judge(Wrong(eager, change), expected["image"], "image")


def test_unchanged_embeddings_pass(checkpoint, expected):
    found = judge_changed(checkpoint, expected, lambda embeddings: embeddings)
    assert found.passed
    assert found.relative_accuracy == 1


def test_low_accuracy_fails_despite_high_cosine(checkpoint, expected):
    """Each image is turned just far enough that another label is nearest, if that takes a small
    turn."""
    labels = expected["image"].labelled.labels.astype(np.float64)

    def turn(embeddings):
        turned = embeddings.copy()
        for row in turned:
            scores = labels @ row
            ways = np.delete(labels - labels[scores.argmax()], scores.argmax(), axis=0)
            steps = -(ways @ row) / np.square(ways).sum(axis=1)
            nearest = np.argmin(steps * np.linalg.norm(ways, axis=1))
            way = 1.05 * steps[nearest] * ways[nearest]
            if np.linalg.norm(way) < 0.18:
                row += way
        return turned

    found = judge_changed(checkpoint, expected, turn)
    assert found.min_cosine >= TOLERANCES["int8"].min_cosine
    assert found.relative_accuracy < TOLERANCES["int8"].relative_accuracy
    assert found.top1_agreement < 1
    assert not found.passed
    without = Expected(probes=expected["image"].probes, labelled=None)
    assert judge_changed(checkpoint, {"image": without}, turn).passed


def test_low_cosine_fails_despite_full_accuracy(checkpoint, expected):
    """A large shift orthogonal to all labels changes the rank of no label."""
    labels = expected["image"].labelled.labels.astype(np.float64)
    aside = np.random.default_rng(0).normal(size=labels.shape[1])
    aside -= labels.T @ np.linalg.lstsq(labels.T, aside, rcond=None)[0]
    aside /= np.linalg.norm(aside)
    found = judge_changed(checkpoint, expected, lambda embeddings: embeddings + 0.5 * aside)
    assert found.accuracy == expected["image"].labelled.accuracy
    assert found.relative_accuracy == found.top1_agreement == 1
    assert found.min_cosine < TOLERANCES["int8"].min_cosine
    assert not found.passed


def test_relative_accuracy_is_1_if_float32_is_never_right(checkpoint, expected):
    reference = expected["image"].labelled
    wrong = (reference.images @ reference.labels.T).argmin(1)
    data = type(reference.data)(
        images=reference.data.images,
        texts=reference.data.texts,
        templates=reference.data.templates,
        truth=wrong,
    )
    hopeless = type(reference)(data=data, images=reference.images, labels=reference.labels)
    assert hopeless.accuracy == 0
    only = Expected(probes=expected["image"].probes, labelled=hopeless)
    found = judge_changed(checkpoint, {"image": only}, lambda embeddings: embeddings)
    assert (found.passed, found.accuracy, found.relative_accuracy) == (True, 0, 1)


def test_invalid_labeled_directory_is_rejected_before_the_build(checkpoint, tmp_path, pictures):
    """The error occurs before the work, so nothing is built."""
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (folder / "captions.txt").write_text("nothing.jpg, dog")
    with pytest.raises(InputError, match="no image has one of its 1 labels as its caption"):
        build(checkpoint, tmp_path / "bundle", silent, Options(labelled=folder))
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


# The bundle


def test_every_artifact_is_built_and_gets_verdicts(bundle):
    made = {(a.tower, a.kind, a.precision): a for a in bundle.manifest.artifacts}
    kinds = {("onnx", "fp32"), ("onnx", "int8-dynamic"), ("torchscript", "fp32")}
    assert made.keys() == {(tower, *kind) for tower in ("image", "text") for kind in kinds}
    judges = {key: {v.runner for v in artifact.verdicts} for key, artifact in made.items()}
    for tower in ("image", "text"):
        assert judges[tower, "onnx", "fp32"] >= {"onnxruntime:fp32", "openvino:fp32"}
        assert judges[tower, "onnx", "int8-dynamic"] == {"onnxruntime:int8-dynamic"}
        assert judges[tower, "torchscript", "fp32"] == {"torchscript:fp32"}
        # A verdict on TorchScript does not count for an ONNX graph.
        assert bundle.artifact(tower, "fp32").kind == "onnx"
        assert not bundle.artifact(tower, "fp32").passed("torchscript:fp32")
    for artifact in made.values():
        assert (bundle.path / artifact.file).is_file()
        assert artifact.quantisation is None
    passed = {key: all(v.passed for v in artifact.verdicts) for key, artifact in made.items()}
    assert passed["image", "onnx", "fp32"]
    assert passed["image", "torchscript", "fp32"]
    assert passed["text", "torchscript", "fp32"]


def test_verdicts_round_trip_through_the_manifest(bundle):
    again = Bundle.open(bundle.path)
    assert again.manifest == bundle.manifest
    assert verdicts(again) == verdicts(bundle)
    document = json.loads((bundle.path / "manifest.json").read_text(), parse_constant=pytest.fail)
    measured = [v for a in document["artifacts"] for v in a["verdicts"]]
    assert all(isinstance(v["relative_accuracy"], float) for v in measured)


def test_quantization_record_round_trips_through_the_manifest(tiny_bundle):
    for tower in ("image", "text"):
        found = Bundle.open(tiny_bundle.path).artifact(tower, "int8").quantisation
        assert found == tiny_bundle.artifact(tower, "int8").quantisation
        assert (found.method, found.calibration) == ("percentile", "synthetic probes")
        assert found.layers == 12
        assert tiny_bundle.artifact(tower, "fp16").quantisation is None


def test_verify_measures_every_artifact_again(bundle, folder):
    again = verify(bundle, None, folder, silent)
    before, after = verdicts(bundle), verdicts(again)
    assert [v.runner for _, v in after] == [v.runner for _, v in before]
    for (_, old), (_, new) in zip(before, after, strict=True):
        assert (new.passed, new.accuracy) == (old.passed, old.accuracy)
        assert new.min_cosine == pytest.approx(old.min_cosine, abs=1e-5)


def test_tampered_torchscript_is_not_opened(bundle, expected, tmp_path):
    """A TorchScript file is executable, so a changed one must not be opened."""
    path = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (artifact,) = (
        a for a in bundle.manifest.artifacts if (a.tower, a.kind) == ("text", "torchscript")
    )
    with (path / artifact.file).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"text\.fp32\.torchscript\.pt is not the file that was"):
        judged(Bundle(path, bundle.manifest), artifact, expected["text"])


# PyTorch's runners

BATCHES = {
    "image": [some_pixels(1, 32), some_pixels(5, 32, seed=1)],
    "text": [some_ids([1], 2), some_ids([1, 5, 7], 8), some_ids([3, 30, 76, 9], 77)],
}


def embeddings(checkpoint, tower: str) -> list[np.ndarray]:
    with EagerRunner(getattr(checkpoint.clip, tower)) as eager:
        return [eager.run(batch) for batch in BATCHES[tower]]


def script(bundle: Bundle, tower: str) -> Path:
    return bundle.path / f"{tower}.fp32.torchscript.pt"


@pytest.mark.parametrize("tower", ["image", "text"])
def test_torchscript_equals_eager(bundle, checkpoint, tower):
    with TorchScriptRunner(script(bundle, tower)) as runner:
        assert runner.name == "torchscript:fp32"
        for batch, want in zip(BATCHES[tower], embeddings(checkpoint, tower), strict=True):
            got = runner.run(batch)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(RunnerError, match=r"torchscript:fp32 is not open; use it in a `with`"):
        runner.run(BATCHES[tower][0])


PROGRAM = """
import sys, warnings
import numpy, torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
given = numpy.load(sys.argv[1])
made = {}
for name, batch in given.items():
    tower = torch.jit.load(sys.argv[2 if name.startswith("image") else 3])
    made[name] = tower(torch.from_numpy(batch)).detach().numpy()
numpy.savez(sys.argv[4], **made)
assert not {"export", "serving", "transformers"} & set(sys.modules)
"""


def test_torchscript_runs_without_this_project(bundle, checkpoint, tmp_path):
    """A process that has torch and cannot import this project computes the same embeddings."""
    given = {f"{t}{n}": batch for t in BATCHES for n, batch in enumerate(BATCHES[t])}
    np.savez(tmp_path / "given.npz", **given)
    files = [tmp_path / "given.npz", script(bundle, "image"), script(bundle, "text")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, *map(str, files), str(tmp_path / "made.npz")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = np.load(tmp_path / "made.npz")
    for tower in BATCHES:
        for number, want in enumerate(embeddings(checkpoint, tower)):
            np.testing.assert_allclose(made[f"{tower}{number}"], want, atol=1e-5)


def test_torchscript_is_frozen(bundle):
    """Weights are constants of the graph, so they cannot be trained by mistake."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(script(bundle, "image"))
    assert list(module.parameters()) == []


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))),
    reason="torch.compile needs a C++ compiler, and there is none",
)


@needs_compiler
def test_compiled_runner_equals_eager_and_passes_the_gate():
    """Uses the smallest possible tower, because compilation is slow."""
    config = VisionTransformerConfig(
        width=32,
        layers=1,
        heads=2,
        mlp_width=32,
        activation="quick_gelu",
        image_size=16,
        patch_size=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = ImageTower(config, 16, MEAN, STD).eval()
    batches = [some_pixels(count, 16, seed=count) for count in (2, 5, 3)]
    with EagerRunner(tower) as eager, CompiledRunner(tower) as compiled:
        expected = Expected(probes=[(b, eager.run(b)) for b in batches], labelled=None)
        found = judge(compiled, expected, "image")
    assert (compiled.name, found.runner) == ("compiled:fp32", "compiled:fp32")
    assert found.passed
    assert found.embeddings == 10
    assert found.max_abs_difference < 1e-5


def test_closed_compiled_runner_is_rejected(checkpoint):
    with pytest.raises(RunnerError, match=r"compiled:fp32 is not open; use it in a `with`"):
        CompiledRunner(checkpoint.clip.image).run(BATCHES["image"][0])


def test_int8_dynamic_is_close_to_eager(bundle, checkpoint):
    with open_runner(bundle, "image", "onnxruntime:int8-dynamic") as runner:
        for batch, want in zip(BATCHES["image"], embeddings(checkpoint, "image"), strict=True):
            cosines = (runner.run(batch) * want).sum(axis=1)
            assert 0.98 < cosines.min() < 1 - 1e-7
