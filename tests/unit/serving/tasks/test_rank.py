"""Ranking compared with transformers' own logits, and answers and captions of drawings."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from serving.clients.local import LocalClip
from serving.clients.triton import ClipClient
from serving.errors import ImageError, InputError, TextError, TextTooLongError
from serving.tasks.rank import Category, answer, caption, rank, read_vocabulary
from serving.tasks.zero_shot import TEMPLATES
from serving.triton.repository import assemble
from serving.triton.server import TritonServer
from tests.support.paths import CHECKOUT
from training.scenes import COLOURS, SHAPES
from training.shapes import draw_labelled

CHECKPOINT = CHECKOUT / "assets" / "shapes-clip"
TEXTS = ["a cat", "two red buses in the rain", "naïve café", "a photo of the sea", "{}"]
DRAWN = 100
VOCABULARY = """
[colour]
words = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black"]
template = "something {}"

[shape]
words = ["circle", "square", "triangle", "star", "heart", "moon", "ring", "cross", "arrow",
         "flower"]
template = "a {}"
"""


@pytest.fixture(scope="module")
def local(tiny_bundle):
    with LocalClip(tiny_bundle.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def files(pictures):
    return sorted(pictures.iterdir())


@pytest.fixture(scope="module")
def logits(tiny_checkpoint, files):
    """transformers' `logits_per_image` of `files` and TEXTS, float32 [files, texts]."""
    model = CLIPModel.from_pretrained(tiny_checkpoint).eval()
    processor = CLIPImageProcessorPil.from_pretrained(tiny_checkpoint)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_checkpoint)
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    tokens = tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.inference_mode():
        return model(**tokens, pixel_values=pixels).logits_per_image.numpy()


@pytest.fixture(scope="module")
def shapes_bundle(tmp_path_factory):
    """The bundle of the shipped checkpoint in float32."""
    from export.checkpoints.load import load_checkpoint
    from export.pipeline import Options, build
    from serving.util.progress import silent

    output = tmp_path_factory.mktemp("rank") / "shapes-clip"
    return build(load_checkpoint(str(CHECKPOINT)), output, silent, Options(precisions=[]))


@pytest.fixture(scope="module")
def shapes(shapes_bundle):
    """The shipped checkpoint, run in this process."""
    with LocalClip(shapes_bundle.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def drawn():
    """Drawings with their captions, such as `a red circle`, one for every pair."""
    return list(draw_labelled(11, DRAWN, 256))


def assert_ranked(ranked, logits, atol=2e-3):
    probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
    assert len(ranked) == len(logits)
    for scores, expected, shares in zip(ranked, logits, probabilities, strict=True):
        assert sorted(score.text for score in scores) == sorted(TEXTS)
        values = [score.logit for score in scores]
        assert values == sorted(values, reverse=True)
        assert sum(score.probability for score in scores) == pytest.approx(1, abs=1e-5)
        for score in scores:
            index = TEXTS.index(score.text)
            assert score.logit == pytest.approx(expected[index], abs=atol)
            assert score.cosine == pytest.approx(expected[index] / 20, abs=atol / 20)
            assert score.probability == pytest.approx(shares[index], abs=atol)


# ------------------------------------------------------------------ rank


def test_scores_equal_transformers_logits(local, files, logits):
    assert local.logit_scale == pytest.approx(20)
    assert np.ptp(logits, axis=0).max() > 0.5  # images differ by more than the tolerance
    assert len(set(logits.argmax(axis=1))) > 1
    assert_ranked(rank(local, files, TEXTS), logits)


def test_scores_of_a_server_equal_transformers_logits(fp32_bundle, files, logits, tmp_path):
    repository = tmp_path / "repository"
    assemble(fp32_bundle, repository, runner="onnxruntime:fp32")
    with (
        TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server,
        ClipClient(server.grpc_url) as client,
    ):
        assert_ranked(rank(client, files, TEXTS), logits)
        best = answer(client, files[0], "it shows", TEXTS[:3])
        assert {score.text for score in best} == set(TEXTS[:3])
        with pytest.raises(TextError, match="empty or only whitespace"):
            rank(client, files, ["a cat", " "])
        done = command("rank", files[0], "--text", "a cat", "--text", "a dog", "--json", url=server)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout.splitlines()[-1])["images"][0]["texts"]) == 2


def test_images_of_several_chunks_keep_their_order(local):
    rng = np.random.default_rng(0)
    many = [rng.integers(0, 256, (33, 40, 3), np.uint8) for _ in range(70)]
    told = []
    ranked = rank(local, many, TEXTS, progress=lambda *step: told.append(step))
    assert told == [("embedding images", done, 70) for done in (0, 64, 70)]
    for index in (0, 63, 64, 69):
        (alone,) = rank(local, [many[index]], TEXTS)
        assert [score.text for score in ranked[index]] == [score.text for score in alone]
        assert ranked[index][0].logit == pytest.approx(alone[0].logit, abs=1e-3)


class Exact:
    """An embedder of 40 texts along two axes, so that equal scores are equal to the last bit."""

    logit_scale = 10.0

    def embed_images(self, images):
        return np.tile(np.float32([0.6, 0.8]), (len(images), 1))

    def embed_texts(self, texts, *, truncate=False):
        return np.eye(2, dtype=np.float32)[[int(text) % 3 % 2 for text in texts]]


def test_equal_scores_keep_the_order_of_the_texts():
    texts = [str(number) for number in range(40)]
    (scores,) = rank(Exact(), ["picture"], texts)
    expected = sorted(texts, key=lambda text: -(int(text) % 3 % 2))
    assert [score.text for score in scores] == expected
    assert [score.logit for score in scores] == pytest.approx([8] * 13 + [6] * 27)


def test_single_text_has_probability_1(local, files):
    assert rank(local, files[:1], ["a cat"])[0][0].probability == 1


def test_long_texts_are_truncated_only_on_request(local, files):
    long = "word " * 100
    with pytest.raises(TextTooLongError, match="more than the model's 77"):
        rank(local, files[:1], ["a cat", long])
    assert len(rank(local, files[:1], ["a cat", long], truncate=True)[0]) == 2


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        ([], "no texts to choose from; give at least one"),
        (["a cat", "a dog", "a cat"], "'a cat' is given more than once; texts must differ"),
        (["a cat", ""], r"^texts\[1\]: the text is empty or only whitespace"),
        ("a cat", "expected a list of texts, got one str"),
        (["a cat", "half \ud800"], r"^texts\[1\]: the text has a lone surrogate"),
    ],
)
def test_invalid_texts_are_rejected(local, files, texts, shown):
    with pytest.raises(TextError, match=shown):
        rank(local, files, texts)


def test_invalid_images_are_rejected(local, files, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(ImageError) as caught:
        rank(local, [*[files[0]] * 66, broken, files[0]], ["a cat"])
    assert (caught.value.kind, caught.value.index) == ("images", 66)
    assert caught.value.name == str(broken)
    with pytest.raises(ImageError, match=r"^images\[64\]: expected one of JPEG"):
        rank(local, [*[files[0]] * 64, b"no picture"], ["a cat"])


# ------------------------------------------------------------------ answer


def test_answers_are_ranked_within_the_template(local, files):
    candidates = ["{question}", "a cat", "two"]
    scores = answer(local, files[0], "how many {answer}?", candidates)
    texts = [f"how many {{answer}}? {candidate}" for candidate in candidates]
    (expected,) = rank(local, [files[0]], texts)
    assert [f"how many {{answer}}? {score.text}" for score in scores] == [s.text for s in expected]
    assert [score.logit for score in scores] == [score.logit for score in expected]


def test_answers_about_drawings_are_correct(shapes, drawn):
    """One question starts the text, and the template omits the other one."""
    colours = right = 0
    for picture, text in drawn:
        _, colour, shape = text.split()
        things = [f"a {other}" for other in SHAPES]
        right += answer(shapes, picture, "a picture of", things)[0].text == f"a {shape}"
        best = answer(
            shapes,
            picture,
            f"what colour is the {shape}?",
            list(COLOURS),
            template="something {answer}",
        )
        colours += best[0].text == colour
    assert colours >= 0.95 * DRAWN
    assert right >= 0.9 * DRAWN


@pytest.mark.parametrize(
    ("question", "candidates", "template", "shown"),
    [
        ("what?", [], "{question} {answer}", "no candidates to choose from; give at least one"),
        ("what?", ["a", "a"], "{question} {answer}", "'a' is given more than once; candidates"),
        ("what?", ["a", " "], "{question} {answer}", "a candidate is empty or only whitespace"),
        (" ", ["a", "b"], "{question} {answer}", "the question is empty; give one, or a template"),
        ("what?", ["a", "b"], "{question}", r"has no \{answer\} to replace with the candidates"),
        ("word " * 80, ["a", "b"], "{question} {answer}", r"^texts\[0\]: .* the model's 77"),
    ],
)
def test_invalid_questions_are_rejected(local, files, question, candidates, template, shown):
    with pytest.raises(TextError, match=shown):
        answer(local, files[0], question, candidates, template=template)


# ------------------------------------------------------------------ caption


@pytest.fixture(scope="module")
def shapes_toml(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "shapes.toml"
    file.write_text(VOCABULARY)
    return file


def test_zero_shot_accuracy_of_a_server_equals_local_accuracy(
    shapes_bundle, shapes, drawn, tmp_path, figure
):
    pictures, names = [picture for picture, _ in drawn], [name for _, name in drawn]
    labels, templates = sorted(set(names)), TEMPLATES["openai-7"]
    here = shapes.classify(pictures, labels, templates)
    assemble(shapes_bundle, tmp_path / "repository", runner="onnxruntime:fp32")
    with (
        TritonServer(tmp_path / "repository", http_port=0, grpc_port=0, metrics_port=0) as server,
        ClipClient(server.grpc_url) as client,
    ):
        there = client.classify(pictures, labels, templates)
    np.testing.assert_allclose(there, here, atol=1e-4)
    right = [
        sum(labels[best] == name for best, name in zip(found.argmax(axis=1), names, strict=True))
        for found in (here, there)
    ]
    assert right[0] == right[1] >= 0.9 * DRAWN
    figure("zero-shot", f"{right[1]} of {DRAWN} right by a server, {right[0]} in process")


def test_captions_of_drawings_are_correct(shapes, drawn, shapes_toml):
    categories = read_vocabulary(shapes_toml)
    assert [set(category.words) for category in categories] == [set(COLOURS), set(SHAPES)]
    pictures = [picture for picture, _ in drawn]
    captions = caption(shapes, pictures, categories, threshold=0, separator=" ")
    right = [c.text == text.partition(" ")[2] for c, (_, text) in zip(captions, drawn, strict=True)]
    assert sum(right) >= 0.9 * DRAWN
    certain = caption(shapes, pictures, categories, threshold=0.9, separator=" ")
    full = [c.text for c in certain if " " in c.text]
    assert 0.5 * DRAWN < len(full) < DRAWN  # the threshold omits uncertain words
    for sure, every in zip(certain, captions, strict=True):
        assert sure.best == every.best
        kept = [s.text for s in sure.best.values() if s.probability >= 0.9]
        assert sure.text.split() == kept


def test_caption_words_equal_zero_shot_labels(local, files):
    categories = [
        Category(name="what", words=("cat", "dog", "sea"), templates=("a {}", "the {}")),
        Category(name="where", words=("indoors", "outdoors")),
    ]
    found = caption(local, files, categories, threshold=0)
    words, places = categories
    expected = local.classify(files, words.words, words.templates)
    default = local.classify(files, places.words)
    for got, what, where in zip(found, expected, default, strict=True):
        best = words.words[what.argmax()], places.words[where.argmax()]
        assert got.text == ", ".join(best)
        shares = got.best["what"].probability, got.best["where"].probability
        assert shares == pytest.approx((what.max(), where.max()), abs=1e-5)


def test_caption_is_empty_below_the_threshold(local, files):
    categories = [Category(name="what", words=("cat", "dog"))]
    (got,) = caption(local, files[:1], categories, threshold=1)
    assert got.text == ""
    assert got.best["what"].probability < 1


@pytest.mark.parametrize(
    ("categories", "shown"),
    [
        ([], "no categories to choose from"),
        ([("a", ["x"]), ("a", ["y"])], "'a' is given more than once; categories must differ"),
        ([("a", ["x"]), ("b", [])], "category 'b': no labels to choose from"),
        ([("a", ["x", "x"])], "category 'a': label 'x' is given more than once"),
        ([("a", ["x", ""])], r"^labels\[1\] \(category 'a'\): .*empty or only whitespace"),
        ([("a", ["word " * 100])], r"^labels\[0\] \(category 'a'\): .* the model's 77"),
        ([("a", ["x"], "no place")], r"category 'a': template 'no place' has no \{\}"),
    ],
)
def test_invalid_vocabularies_are_rejected(local, files, categories, shown):
    made = [Category(name=n, words=tuple(w), templates=tuple(t) or None) for n, w, *t in categories]
    with pytest.raises(TextError, match=shown):
        caption(local, files[:1], made)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_invalid_thresholds_are_rejected(local, files, threshold):
    with pytest.raises(InputError, match="expected a threshold from 0 to 1"):
        caption(local, files[:1], [Category(name="a", words=("x",))], threshold=threshold)


def test_vocabularies_are_read_in_both_formats(tmp_path):
    expected = [
        Category(name="b", words=("x", "y")),
        Category(name="a", words=("z",), templates=("the {}",)),
        Category(name="c", words=("u",), templates=("a {}", "an {}")),
    ]
    document = {
        "b": ["x", "y"],
        "a": {"words": ["z"], "template": "the {}"},
        "c": {"words": ["u"], "template": ["a {}", "an {}"]},
    }
    (tmp_path / "v.json").write_text(json.dumps(document))
    (tmp_path / "v.toml").write_text(
        'b = ["x", "y"]\n[a]\nwords = ["z"]\ntemplate = "the {}"\n'
        '[c]\nwords = ["u"]\ntemplate = ["a {}", "an {}"]\n'
    )
    assert read_vocabulary(tmp_path / "v.json") == expected
    assert read_vocabulary(tmp_path / "v.toml") == expected


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("v.txt", "a", r"expected a vocabulary in a \.toml or \.json file"),
        ("v.json", "{", r"v\.json is not valid JSON: "),
        ("v.toml", "a = [", r"v\.toml is not valid TOML: "),
        ("v.json", "[]", "expected categories, such as color"),
        ("v.json", "{}", "expected categories, such as color"),
        ("v.json", '{"a": "red"}', "category 'a': expected words to be a list of strings"),
        ("v.json", '{"a": ["red", 1]}', "category 'a': expected words to be a list of strings"),
        ("v.json", '{"a": {"template": "x {}"}}', "category 'a': expected words to be a list"),
        ("v.json", '{"a": {"words": ["x"], "template": 1}}', "'a': expected template to be a list"),
        ("v.json", '{"a": {"words": ["x"], "threshold": 1}}', "`template`, got 'threshold'"),
        ("v.json", b"\xff\xfe", "cannot be read"),
    ],
)
def test_invalid_vocabulary_files_are_rejected(tmp_path, name, content, shown):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=shown):
        read_vocabulary(file)


def test_missing_vocabulary_file_is_rejected(tmp_path):
    with pytest.raises(InputError, match=r"none\.json cannot be read"):
        read_vocabulary(tmp_path / "none.json")


# ------------------------------------------------------------------ commands


def command(*arguments, url=None, bundle=None):
    line = [sys.executable, "-m", "serving", *map(str, arguments)]
    line += ["--url", url.grpc_url] if url else ["--bundle", str(bundle.path)] if bundle else []
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_help_names_the_three_commands():
    from typer.testing import CliRunner

    from serving.__main__ import app

    for name in ("rank", "answer", "caption"):
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert "--bundle" in shown.stdout
    missing = CliRunner().invoke(app, ["answer", "x.jpg", "--question", "a"])
    assert missing.exit_code == 2
    assert "--candidate" in missing.stderr


def test_rank_command_equals_rank(fp32_bundle, local, files, tmp_path):
    listing = tmp_path / "texts.txt"
    listing.write_text("".join(f"{text}\n" for text in TEXTS))
    done = command("rank", *files[:2], "--texts", listing, "--json", bundle=fp32_bundle)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["images"]
    assert [row["image"] for row in rows] == [str(file) for file in files[:2]]
    for row, scores in zip(rows, rank(local, files[:2], TEXTS), strict=True):
        for got, score in zip(row["texts"], scores, strict=True):
            assert got["text"] == score.text
            assert got["logit"] == pytest.approx(score.logit, abs=1e-3)
    shown = command("rank", files[0], "--texts", listing, "--top", "2", bundle=fp32_bundle)
    first, second, third = (score.text for score in rank(local, files[:1], TEXTS)[0][:3])
    assert "5 texts ranked" in shown.stdout
    assert first in shown.stdout
    assert second in shown.stdout
    assert third not in shown.stdout


def test_answer_command_prints_answers(fp32_bundle, files):
    options = ["--question", "it is", "--candidate", "[a] cat", "--candidate", "a dog"]
    done = command("answer", files[0], *options, "--json", bundle=fp32_bundle)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["image"], document["question"]) == (str(files[0]), "it is")
    assert {score["text"] for score in document["answers"]} == {"[a] cat", "a dog"}
    assert sum(score["probability"] for score in document["answers"]) == pytest.approx(1)
    shown = command("answer", files[0], *options, bundle=fp32_bundle)
    assert "[a] cat" in shown.stdout  # not interpreted as markup


def test_caption_command_prints_captions(fp32_bundle, files, shapes_toml):
    options = ["--categories", shapes_toml, "--threshold", "0", "--separator", " / "]
    done = command("caption", *files, *options, "--json", bundle=fp32_bundle)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["images"]
    assert [row["image"] for row in rows] == [str(file) for file in files]
    for row in rows:
        assert row["caption"] == f"{row['best']['colour']['text']} / {row['best']['shape']['text']}"
    options[3] = "1"
    shown = command("caption", files[0], *options, bundle=fp32_bundle)
    assert shown.returncode == 0, shown.stderr
    assert "colour" in shown.stdout
    assert "│ - " in shown.stdout  # an empty caption


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["rank", "x.jpg", "--text", "a", "--texts", "b"], "either --text or --texts, got both"),
        (["rank", "FILE", "--text", "a", "--text", "a"], "'a' is given more than once"),
        (["caption", "x.jpg", "--categories", "none.json"], "none.json cannot be read"),
    ],
)
@pytest.mark.wording
def test_commands_show_errors_without_a_traceback(fp32_bundle, files, arguments, shown):
    arguments = [files[0] if argument == "FILE" else argument for argument in arguments]
    done = command(*arguments, bundle=fp32_bundle)
    assert done.returncode == 2
    assert shown in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
