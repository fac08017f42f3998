"""Classification against transformers' own logits; search against brute force."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from serving.errors import InputError, TextError
from serving.local import LocalClip
from serving.search import nearest
from serving.zero_shot import classify, embed_labels, probabilities

LABELS = ("cat", "a red bus", "naïve café")
TEMPLATES = ("a photo of a {}.", "{}", "one {} and another {}")


@pytest.fixture(scope="module")
def local(tiny_bundle):
    with LocalClip(tiny_bundle.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    return (
        CLIPModel.from_pretrained(tiny_checkpoint).eval(),
        CLIPImageProcessorPil.from_pretrained(tiny_checkpoint),
        CLIPTokenizer.from_pretrained(tiny_checkpoint),
    )


@pytest.fixture(scope="module")
def files(pictures):
    return sorted(pictures.iterdir())


def references(reference, files, texts):
    """transformers' output for picture files and texts."""
    model, processor, tokenizer = reference
    pixels = processor([Image.open(file) for file in files], return_tensors="np")["pixel_values"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    ids = [row + [49407] * (longest - len(row)) for row in rows]
    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids), pixel_values=torch.from_numpy(np.asarray(pixels)))


def test_equal_to_transformers_logits(local, reference, files):
    """A default template each: then zero-shot is CLIP's own softmax over `logits_per_image`."""
    got = local.classify(files, LABELS, ["a photo of a {}."])
    texts = [f"a photo of a {label}." for label in LABELS]
    expected = references(reference, files, texts).logits_per_image.softmax(dim=1).numpy()
    assert (got.shape, got.dtype) == ((len(files), 3), np.float32)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-6)
    assert np.ptp(expected, axis=0).max() > 0.05  # pictures do differ by more than the tolerance


def test_several_templates_are_averaged_and_normalised(local, reference, files):
    texts = [template.replace("{}", label) for label in LABELS for template in TEMPLATES]
    out = references(reference, files, texts)
    means = out.text_embeds.reshape(3, len(TEMPLATES), -1).mean(dim=1)
    means = means / means.norm(dim=1, keepdim=True)
    expected = (20 * out.image_embeds @ means.T).softmax(dim=1).numpy()
    got = classify(local, files, LABELS, TEMPLATES)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    labels = embed_labels(local, LABELS, TEMPLATES)
    np.testing.assert_allclose(np.linalg.norm(labels, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(labels, means.numpy(), atol=1e-4)


def test_the_checkpoints_own_templates_are_the_default(local):
    assert local.templates == ("a photo of a {}.",)
    assert np.array_equal(
        embed_labels(local, LABELS), embed_labels(local, LABELS, ["a photo of a {}."])
    )


def test_one_label_is_certain(local, files):
    np.testing.assert_array_equal(local.classify(files[:2], ["cat"]), [[1], [1]])


def test_braces_in_a_label_are_text(local):
    labels = embed_labels(local, ["{}", "{0} {x}"], ["the {}"])
    np.testing.assert_allclose(labels, local.embed_texts(["the {}", "the {0} {x}"]), atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "templates", "shown"),
    [
        ((), None, "no labels to choose from; give at least one"),
        (("cat", "dog", "cat"), None, "label 'cat' is given more than once"),
        (("cat",), ("a photo of a {}", "a photo"), r"template 'a photo' has no \{\} for the label"),
        (("cat", ""), ("{}",), "empty or only whitespace"),
        (("word " * 100,), None, "more than the model's 77"),
    ],
)
def test_labels_and_templates_that_cannot_be_used(local, labels, templates, shown):
    with pytest.raises(TextError, match=shown):
        embed_labels(local, labels, templates)


def test_large_scales_do_not_overflow():
    images = np.eye(2, dtype=np.float32)
    got = probabilities(images, images, 1e6)
    np.testing.assert_array_equal(got, images)


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_nearest_equals_brute_force():
    rng = np.random.default_rng(0)
    queries, embeddings = unit(rng, 5, 16), unit(rng, 200, 16)
    indices, cosines = nearest(queries, embeddings, 10)
    assert indices.shape == cosines.shape == (5, 10)
    assert cosines.dtype == np.float32
    for query, hits, values in zip(queries, indices, cosines, strict=True):
        every = sorted(((-float(query @ e), i) for i, e in enumerate(embeddings)))[:10]
        assert hits.tolist() == [i for _, i in every]
        np.testing.assert_allclose(values, [-c for c, _ in every], atol=1e-6)


def test_of_equals_the_first_comes_first():
    kinds = np.array([[0, 1], [1, 0], [-1, 0]], np.float32)
    rows = kinds[
        np.random.default_rng(2).integers(0, 3, 300)
    ]  # a short list is sorted stably anyway
    indices, cosines = nearest(kinds[1:2], rows, 250)
    expected = sorted(range(300), key=lambda index: (-rows[index, 0], index))[:250]
    assert indices[0].tolist() == expected
    assert cosines[0].tolist() == [rows[index, 0] for index in expected]


def test_no_more_hits_than_there_are():
    rows = unit(np.random.default_rng(1), 3, 4)
    indices, cosines = nearest(rows[:1], rows, 10)
    assert sorted(indices[0].tolist()) == [0, 1, 2]
    assert indices[0, 0] == 0
    assert cosines.shape == (1, 3)


@pytest.mark.parametrize("shape", [(1, 5), (5,), (1, 4, 1)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(InputError, match=r"do not fit; expected \[q, dim\] and \[n, dim\]"):
        nearest(np.zeros(shape, np.float32), np.zeros((3, 4), np.float32), 1)
