"""Classification compared with transformers' own logits, and search with brute force."""

import html
import json
import random
from dataclasses import replace

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from serving.clients.local import LocalClip
from serving.errors import ImageError, InputError, TextError, TextTooLongError
from serving.inputs.labels import LabelSet
from serving.inputs.tokenizer import Tokenizer, clean
from serving.runners.registry import open_runner
from serving.search.query import nearest
from serving.tasks import zero_shot
from serving.tasks.zero_shot import (
    TEMPLATES as BUILT_IN,
)
from serving.tasks.zero_shot import (
    ZeroShotClassifier,
    embed_labels,
    probabilities,
    read_templates,
)

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
    """transformers' output for image files and texts."""
    model, processor, tokenizer = reference
    pixels = processor([Image.open(file) for file in files], return_tensors="np")["pixel_values"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    ids = [row + [49407] * (longest - len(row)) for row in rows]
    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids), pixel_values=torch.from_numpy(np.asarray(pixels)))


def test_probabilities_equal_transformers(local, reference, files):
    """With one template per label, zero-shot equals CLIP's softmax over `logits_per_image`."""
    got = local.classify(files, LABELS, ["a photo of a {}."])
    texts = [f"a photo of a {label}." for label in LABELS]
    expected = references(reference, files, texts).logits_per_image.softmax(dim=1).numpy()
    assert (got.shape, got.dtype) == ((len(files), 3), np.float32)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-6)
    assert np.ptp(expected, axis=0).max() > 0.05  # images differ by more than the tolerance


def test_several_templates_are_averaged_and_normalized(local, reference, files):
    texts = [template.replace("{}", label) for label in LABELS for template in TEMPLATES]
    out = references(reference, files, texts)
    means = out.text_embeds.reshape(3, len(TEMPLATES), -1).mean(dim=1)
    means = means / means.norm(dim=1, keepdim=True)
    expected = (20 * out.image_embeds @ means.T).softmax(dim=1).numpy()
    got = local.classify(files, LABELS, TEMPLATES)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    labels = embed_labels(local, LABELS, TEMPLATES)
    np.testing.assert_allclose(np.linalg.norm(labels, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(labels, means.numpy(), atol=1e-4)


def test_templates_of_the_checkpoint_are_the_default(local):
    assert local.templates == ("a photo of a {}.",)
    assert np.array_equal(
        embed_labels(local, LABELS), embed_labels(local, LABELS, ["a photo of a {}."])
    )


def test_single_label_has_probability_1(local, files):
    np.testing.assert_array_equal(local.classify(files[:2], ["cat"]), [[1], [1]])


def test_braces_in_a_label_are_literal(local):
    labels = embed_labels(local, ["{}", "{0} {x}"], ["the {}"])
    np.testing.assert_allclose(labels, local.embed_texts(["the {}", "the {0} {x}"]), atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "templates", "shown"),
    [
        ((), None, "no labels to choose from; give at least one"),
        (("cat", "dog", "cat"), None, "label 'cat' is given more than once"),
        (("cat",), ("a photo of a {}", "a photo"), r"template 'a photo' has no \{\}; put \{\}"),
        (("cat", ""), ("a {}",), r"^labels\[1\]: the label is empty or only whitespace: ''"),
        (("cat",), (), "no prompt templates"),
        ("cat", None, "expected lists of labels and of templates, got one str"),
        (("cat", 3), None, "expected labels and templates to be str, got int"),
        (
            ("cat", "word " * 100),
            ("{}", "a {}"),
            r"^labels\[1\]: in prompt template '\{\}': the text has 102 tokens.*than the "
            "model's 77",
        ),
        (
            ("word " * 100,),
            None,
            r"^labels\[0\]: in prompt template 'a photo of a \{\}\.': the text has 107",
        ),
        (("cat", "dog", "a\0b"), ("{}",), r"^labels\[2\]: in prompt .*: the text has a NUL char"),
    ],
)
def test_invalid_labels_and_templates_are_rejected(local, labels, templates, shown):
    with pytest.raises(TextError, match=shown):
        embed_labels(local, labels, templates)


def test_large_scales_do_not_overflow():
    images = np.eye(2, dtype=np.float32)
    got = probabilities(images, images, 1e6)
    np.testing.assert_array_equal(got, images)


# ------------------------------------------------------------------ many texts


def test_mixed_text_lengths_equal_single_padded_texts(local, tiny_bundle):
    """Sorted and truncated texts give the same embeddings as single texts padded to the context
    length."""
    rng = np.random.default_rng(0)
    words = ["cat", "a", "naïve", "🐈", "photograph", "bus", "42"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 14))) for _ in range(200)]
    texts += ["word " * 75, "a"]
    spec = tiny_bundle.manifest.text
    tokenizer = Tokenizer(tiny_bundle.tokenizer, spec)
    with open_runner(tiny_bundle, "text", "onnxruntime:fp32") as runner:
        rows = [tokenizer.padded(tokenizer.encode([text]), spec.context_length) for text in texts]
        expected = np.concatenate([runner.run(row) for row in rows])
    assert len({len(tokenizer.encode([text])[0]) for text in texts}) > 15
    np.testing.assert_allclose(local.embed_texts(texts), expected, atol=1e-6)


def test_invalid_text_among_many_is_named(local):
    with pytest.raises(TextError, match="the text is empty") as caught:
        local.embed_texts([*["a cat"] * 70, " ", "a dog"])
    assert (caught.value.kind, caught.value.index) == ("texts", 70)


def test_many_texts_are_embedded_in_groups(local, monkeypatch):
    labels = [f"thing {index}" for index in range(10)]
    whole, told = embed_labels(local, labels, TEMPLATES), []
    monkeypatch.setattr(zero_shot, "_GROUP", 7)  # fewer texts than one template has
    grouped = embed_labels(local, labels, TEMPLATES, progress=lambda *step: told.append(step))
    np.testing.assert_allclose(grouped, whole, atol=1e-6)
    assert told == [("embedding texts", done, 30) for done in (0, 7, 14, 21, 28)]
    with pytest.raises(TextTooLongError, match=r"in prompt template 'a photo of") as caught:
        embed_labels(local, [*labels[:9], "word " * 75], TEMPLATES)
    assert (caught.value.kind, caught.value.index) == ("labels", 9)


def test_label_set_combines_labels_and_templates():
    labels = LabelSet(("x", "y", "z"), ("a {}", "{} b"))
    assert labels.texts() == ["a x", "x b", "a y", "y b", "a z", "z b"]
    assert labels.texts(1, 4) == ["x b", "a y", "y b"]
    assert labels.texts(4, 99) == ["a z", "z b"]
    assert len(labels) == 6
    assert labels.some(labels.by_template()) == ["a x", "a y", "a z", "x b", "y b", "z b"]
    error = TextTooLongError("is bad", kind="texts", index=1, advice="mend it")
    blamed = labels.blamed(error, [0, 5])
    assert type(blamed) is TextTooLongError
    assert (blamed.kind, blamed.index) == ("labels", 2)
    assert blamed.advice == "shorten the label or the template"
    assert blamed.reason == "in prompt template '{} b': is bad"


def test_plain_ascii_is_cleaned_like_ftfy():
    """`clean` skips ftfy for texts that ftfy would not change. This test verifies that."""
    drawn, characters = random.Random(0), [chr(code) for code in range(32, 127)]
    for _ in range(3000):
        text = "".join(drawn.choice(characters) for _ in range(drawn.randint(1, 25)))
        whole = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean(text) == " ".join(whole.split()).lower()
    assert clean("a &amp;amp; b") == "a & b"


# ------------------------------------------------------------------ the classifier


@pytest.fixture(scope="module")
def classifier(local):
    return ZeroShotClassifier(local, LABELS, TEMPLATES)


def test_classifier_equals_classify(classifier, local, files):
    expected = local.classify(files, LABELS, TEMPLATES)
    np.testing.assert_array_equal(classifier.classify(files), expected)
    np.testing.assert_array_equal(
        classifier.classify_embeddings(local.embed_images(files)), expected
    )
    parts = list(classifier.batches(iter(files), 3))
    assert [len(part) for part in parts] == [3, 3, 2]
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-6)


def test_error_index_counts_images_of_all_batches(classifier, files, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing like it")
    for before, after in ((4, files[:1]), (3, [])):  # with other images in its batch, and alone
        with pytest.raises(ImageError, match=r"bad\.jpg\): expected one of") as caught:
            list(classifier.batches([*files[:before], bad, *after], 3))
        assert (caught.value.kind, caught.value.index) == ("images", before)
        assert caught.value.name == str(bad)


def test_top_k_returns_the_best_labels(classifier, files):
    scores = classifier.classify(files)
    for k in (1, 2, 3, 10):
        for row, best in zip(scores, classifier.top_k(files, k), strict=True):
            expected = sorted(zip(LABELS, row.tolist(), strict=True), key=lambda item: -item[1])
            assert best == expected[:k]
    with pytest.raises(InputError, match="to be 1 or more; got 0"):
        classifier.top_k(files, 0)


def test_saved_classifier_round_trip(classifier, local, files, tmp_path):
    path = tmp_path / "labels.npz"
    classifier.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["labels.npz"]
    loaded = ZeroShotClassifier.load(path, local)
    assert (loaded.labels, loaded.templates) == (LABELS, TEMPLATES)
    np.testing.assert_array_equal(loaded.embeddings, classifier.embeddings)
    np.testing.assert_array_equal(loaded.classify(files), classifier.classify(files))


class Other:
    """An embedder with other weights."""

    def __init__(self, embedder, **changes):
        self.identity = replace(embedder.identity, **changes)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"weights_sha256": "0" * 64, "name": "other"}, r"by other \(32 dimensions, weights 0000"),
        ({"embed_dim": 64}, r"by tiny-clip \(64 dimensions"),
    ],
)
def test_classifier_of_another_model_is_rejected(classifier, local, tmp_path, changes, shown):
    path = tmp_path / "labels.npz"
    classifier.save(path)
    with pytest.raises(InputError, match=r"embedded by tiny-clip \(32 dimensions.*" + shown):
        ZeroShotClassifier.load(path, Other(local, **changes))
    # Equal weights under another name, for example in another precision, are the same model.
    ZeroShotClassifier.load(path, Other(local, name="tiny-clip-int8"))


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(8) + data[middle + 8 :]


def test_invalid_classifier_file_is_rejected(classifier, local, tmp_path):
    path = tmp_path / "labels.npz"
    with pytest.raises(InputError, match=r"labels\.npz: no such file"):
        ZeroShotClassifier.load(path, local)
    classifier.save(path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], damaged(whole)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a saved classifier, or is damaged"):
            ZeroShotClassifier.load(path, local)
    np.savez(path, embeddings=classifier.embeddings)
    with pytest.raises(InputError, match="is not a saved classifier"):
        ZeroShotClassifier.load(path, local)
    np.savez(path, facts=np.array({"a": 1}, object), embeddings=classifier.embeddings)
    with pytest.raises(InputError, match=r"is not a saved classifier.*allow_pickle"):
        ZeroShotClassifier.load(path, local)
    facts = {"format": 2, "labels": [], "templates": [], "model": {}}
    np.savez(path, facts=np.array(json.dumps(facts)), embeddings=classifier.embeddings)
    with pytest.raises(InputError, match="has format 2, expected 1"):
        ZeroShotClassifier.load(path, local)
    path.write_bytes(whole)
    with np.load(path) as file:
        np.savez(path, facts=file["facts"], embeddings=file["embeddings"][:2])
    with pytest.raises(InputError, match=r"embeddings float32 \[2, 32\]"):
        ZeroShotClassifier.load(path, local)


def test_templates_are_read_by_name_and_from_a_file(tmp_path):
    assert read_templates("openai-7") is BUILT_IN["openai-7"]
    assert len(BUILT_IN["openai-7"]) == 7
    for name, templates in BUILT_IN.items():
        assert LabelSet(("x",), templates).texts(), name
    file = tmp_path / "templates.txt"
    file.write_text("a {}\n\n  the {} \n")
    assert read_templates(str(file)) == ("a {}", "the {}")
    file.write_text("\n")
    with pytest.raises(InputError, match="has no templates; give one per line"):
        read_templates(str(file))
    with pytest.raises(InputError, match=r"neither a file .* built-in sets: plain, openai-7"):
        read_templates("openai-80")


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


def test_equal_scores_keep_the_order_of_the_rows():
    kinds = np.array([[0, 1], [1, 0], [-1, 0]], np.float32)
    rows = kinds[
        np.random.default_rng(2).integers(0, 3, 300)
    ]  # the sort of a short list is stable anyway
    indices, cosines = nearest(kinds[1:2], rows, 250)
    expected = sorted(range(300), key=lambda index: (-rows[index, 0], index))[:250]
    assert indices[0].tolist() == expected
    assert cosines[0].tolist() == [rows[index, 0] for index in expected]


def test_hits_are_limited_to_the_number_of_rows():
    rows = unit(np.random.default_rng(1), 3, 4)
    indices, cosines = nearest(rows[:1], rows, 10)
    assert sorted(indices[0].tolist()) == [0, 1, 2]
    assert indices[0, 0] == 0
    assert cosines.shape == (1, 3)


@pytest.mark.parametrize("shape", [(1, 5), (5,), (1, 4, 1)])
def test_mismatched_shapes_are_rejected(shape):
    with pytest.raises(InputError, match=r"expected queries \[q, dim\] and embeddings \[n, dim\]"):
        nearest(np.zeros(shape, np.float32), np.zeros((3, 4), np.float32), 1)
