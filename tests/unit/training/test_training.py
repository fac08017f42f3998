"""Training: the loss, the loop, directories of pairs, and the shipped checkpoint."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import typer.testing
from PIL import Image
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from export.checkpoints.load import load_checkpoint
from export.towers.clip import Clip, ClipConfig, TextConfig, VisionTransformerConfig
from export.towers.resnet import ResNetConfig
from serving.errors import CheckpointError, ImageError, InputError
from tests.support.paths import CHECKOUT
from training import contrastive, dataset, demo, shapes
from training.__main__ import app
from training.batches import MixedBatches, PairKind, Pairs
from training.contrastive import Settings
from training.demo import IMAGE, TEMPLATES
from training.folder import Sizes, train_folder
from training.initialise import initialise
from training.measure import Model, embed_pixels, embed_texts, zero_shot_accuracy

SHIPPED = CHECKOUT / "assets" / "shapes-clip"
TINY = Sizes(
    image_size=32, patch_size=8, width=32, layers=1, text_width=32, text_layers=1, embed_dim=16
)
TINY_RESNET = Sizes(
    tower="resnet", image_size=32, width=4, layers=1, text_width=32, text_layers=1, embed_dim=16
)


def tiny_clip(seed: int = 0, resnet: bool = False) -> Clip:
    torch.manual_seed(seed)
    image: VisionTransformerConfig | ResNetConfig = VisionTransformerConfig(
        image_size=32,
        patch_size=8,
        width=16,
        layers=1,
        heads=2,
        mlp_width=32,
        activation="quick_gelu",
    )
    if resnet:
        image = ResNetConfig(image_size=32, width=4, layers=(1, 1, 1, 1), heads=2)
    text = TextConfig(
        context_length=8,
        vocab_size=20,
        end_id=19,
        width=16,
        layers=1,
        heads=2,
        mlp_width=32,
        activation="quick_gelu",
    )
    return Clip(ClipConfig(embed_dim=8, image=image, text=text), IMAGE.mean, IMAGE.std)


def tiny_pairs(count: int = 40) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 18, (count, 8), generator=generator, dtype=torch.int32)
    ids[:, 5:] = 19
    return Pairs(
        pixels=torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8),
        input_ids=ids,
        picture_of=torch.arange(count),
        kinds={
            "one": PairKind(torch.arange(count // 2)[:, None], 0.5),
            "two": PairKind(torch.arange(count // 2, count).view(-1, 2), 0.5),
        },
    )


def settings(**changes: object) -> Settings:
    given = {
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "checkpoint_every": 3,
        "threads": 1,
    } | changes
    return Settings(**given)  # type: ignore[arg-type]


def same(one: Clip, other: Clip) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_loss_and_gradients_equal_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        [torch.randn(7, 5, generator=g).requires_grad_() for _ in range(2)]
        + [torch.tensor(2.5, requires_grad=True)]
        for g in (generator, torch.Generator().manual_seed(0))
    )
    loss = contrastive.info_nce(*ours)
    image, text, scale = theirs
    reference = image_text_contrastive_loss(text @ image.T * scale.exp())
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_temperature_is_clamped_at_100(tmp_path) -> None:
    clip = tiny_clip()
    with torch.no_grad():
        clip.logit_scale.fill_(9.0)
    contrastive.train(clip, tiny_pairs(), settings(steps=1), tmp_path / "s")
    assert clip.logit_scale.item() == pytest.approx(math.log(100))


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [contrastive.learning_rate(step, settings(steps=100)) for step in range(101)]
    assert rates[0] == pytest.approx(5e-4)
    assert max(rates) == rates[1] == rates[2] == pytest.approx(1e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_norms_biases_embeddings_and_temperature_have_no_weight_decay() -> None:
    clip = tiny_clip()
    decayed, free = contrastive.make_optimizer(clip, settings()).param_groups
    names = {id(parameter): name for name, parameter in clip.named_parameters()}
    assert free["weight_decay"] == 0
    assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    kept = " ".join(names[id(p)] for p in decayed["params"])
    assert "norm" not in kept
    assert "token_embedding" not in kept
    assert len(decayed["params"]) + len(free["params"]) == len(list(clip.parameters()))


def test_batches_mix_kinds_and_visit_every_pair_once_per_epoch() -> None:
    kinds = tiny_pairs().kinds
    batches = MixedBatches(kinds, 8, seed=3)
    epoch = [batches(step) for step in range(5)]
    for batch in epoch:
        assert (batch < 20).sum() == 4
        together = batch[4:].view(-1, 2)
        assert torch.equal(together[:, 0] + 1, together[:, 1])
    assert torch.cat(epoch).sort().values.tolist() == list(range(40))
    assert torch.equal(MixedBatches(kinds, 8, seed=3)(7), batches(7))
    assert not torch.equal(MixedBatches(kinds, 8, seed=4)(7), batches(7))
    late = {"one": kinds["one"], "two": PairKind(kinds["two"].groups, 0.5, from_step=1)}
    assert (MixedBatches(late, 8, seed=3)(0) < 20).all()
    assert torch.equal(MixedBatches(late, 8, seed=3)(1), batches(1))
    with pytest.raises(InputError, match=r"a batch of 100 needs 50 groups of kind 'one'.* 20"):
        MixedBatches(kinds, 100, seed=0)


@pytest.mark.parametrize("resnet", [False, True])
def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, resnet) -> None:
    whole, stopped, resumed = (tiny_clip(seed, resnet) for seed in (0, 0, 1))
    losses = contrastive.train(whole, tiny_pairs(), settings(), tmp_path / "whole")
    step = contrastive._step

    def stop_at_four(*arguments: object) -> float:
        if arguments[4] == 4:
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(contrastive, "_step", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        contrastive.train(stopped, tiny_pairs(), settings(), tmp_path / "s")
    monkeypatch.setattr(contrastive, "_step", step)
    again = contrastive.train(resumed, tiny_pairs(), settings(), tmp_path / "s", resume=True)
    assert again == losses
    assert same(resumed, whole)
    assert not torch.are_deterministic_algorithms_enabled()


def test_resuming_requires_a_run_with_the_same_settings(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume"):
        contrastive.train(tiny_clip(), tiny_pairs(), settings(), tmp_path / "s", resume=True)
    contrastive.train(tiny_clip(), tiny_pairs(), settings(), tmp_path / "s")
    other = settings(learning_rate=2e-3)
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.001 \(now 0\.002\)"):
        contrastive.train(tiny_clip(), tiny_pairs(), other, tmp_path / "s", resume=True)


def test_training_reports_its_first_and_last_step(tmp_path) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(step: str, done: int = 0, total: int = 0) -> None:
        seen.append((step, done, total))

    losses = contrastive.train(
        tiny_clip(), tiny_pairs(), settings(), tmp_path / "s", progress=progress
    )
    assert [(done, total) for _, done, total in seen] == [(1, 6), (6, 6)]
    for (step, _, _), loss in zip(seen, (losses[0], losses[-1]), strict=True):
        assert step.startswith(f"training, loss {loss:.3f}, ")
        assert step.endswith(" pairs/s")


@pytest.mark.parametrize("resnet", [False, True])
def test_frozen_towers_stay_bit_identical(tmp_path, resnet) -> None:
    before, clip = tiny_clip(resnet=resnet), tiny_clip(resnet=resnet)
    contrastive.train(clip, tiny_pairs(), settings(projections_only=True), tmp_path / "s")
    changed = {
        name
        for name, tensor in clip.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    }
    last = ["attention.output.weight", "attention.output.bias"] if resnet else ["projection.weight"]
    assert changed == {
        *(f"image.encoder.{name}" for name in last),
        "text.projection.weight",
        "logit_scale",
    }


def test_patch_embedding_is_initialized_as_whitening() -> None:
    clip = tiny_clip()
    pixels = tiny_pairs(400).pixels
    initialise(clip.image, pixels)
    encoder = clip.image.encoder
    normalised = (pixels.float() - clip.image.mean) * clip.image.inverse_std
    patches = encoder.patch_embedding(normalised).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(patches.T.cov(), torch.eye(16), atol=0.05, rtol=0)


def captions() -> list[str]:
    rng = np.random.default_rng(0)
    pairs = [(shapes.COLOURS[i % 10], shapes.SHAPES[i // 10 % 10]) for i in range(300)]
    return [f"{shapes.label(pair)}, number {rng.integers(1000)}" for pair in pairs]


def test_tokenizer_equals_transformers_clip_tokenizer(tmp_path) -> None:
    tokenizer = dataset.train_tokenizer(captions(), 600)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.token_to_id("<|startoftext|>") == tokenizer.get_vocab_size() - 2
    assert tokenizer.token_to_id("<|endoftext|>") == tokenizer.get_vocab_size() - 1
    spec = dataset.text_spec(tokenizer, 77)
    for text in [*captions()[:50], "Großes  Haus, don't!", "日本語 ☃", "x1y22"]:
        expected = reference(text)["input_ids"]
        assert tokenizer.encode(text).ids == expected
        ids = dataset.encode(tokenizer, spec, [text])[0]
        assert ids.dtype == torch.int32
        assert ids[: len(expected)].tolist() == expected
    with pytest.raises(InputError, match="at least 514, got 100"):
        dataset.train_tokenizer(captions(), 100)


def write_pairs(folder: Path, header: bool = False) -> Path:
    shapes.write_folder(folder, count=12, seed=1, size=40)
    if header:
        listing = folder / "captions.txt"
        listing.write_text("image,caption\n" + listing.read_text())
    return folder


@pytest.mark.parametrize("sizes", [TINY, TINY_RESNET], ids=["vit", "resnet"])
def test_training_on_a_directory_writes_a_checkpoint(tmp_path, sizes) -> None:
    folder = write_pairs(tmp_path / "pairs", header=True)
    report = train_folder(folder, tmp_path / "out", tmp_path / "s", settings(steps=8), sizes)
    assert (report.images, report.captions) == (12, 12)
    assert report.last_loss < report.first_loss
    assert not (tmp_path / "s").exists()
    with Image.open(tmp_path / "out" / "loss.png") as curve:
        assert curve.size[0] > 300
    loaded = load_checkpoint(str(tmp_path / "out"))
    assert loaded.weights == "trained"
    model = Model(loaded.clip, loaded.image, loaded.tokenizer, loaded.text)
    assert embed_texts(model, ["a red circle"]).shape == (1, 16)
    pixels = dataset.load_pixels([folder / "0000.jpg"], loaded.image)
    assert embed_pixels(model, pixels).shape == (1, 16)

    more = settings(steps=2, projections_only=True)
    start = str(tmp_path / "out")
    train_folder(folder, tmp_path / "tuned", tmp_path / "s", more, sizes, start)
    tuned = load_checkpoint(str(tmp_path / "tuned"))
    assert torch.equal(
        tuned.clip.text.token_embedding.weight, loaded.clip.text.token_embedding.weight
    )
    assert not torch.equal(tuned.clip.text.projection.weight, loaded.clip.text.projection.weight)


def test_both_listing_formats_are_read(tmp_path) -> None:
    write_pairs(tmp_path)
    pairs = dataset.read_folder(tmp_path)
    assert len(pairs) == 12
    rows = [{"image_path": path.name, "text": text} for path, text in pairs]
    (tmp_path / "captions.txt").unlink()
    (tmp_path / "dataset.json").write_text(json.dumps(rows))
    assert dataset.read_folder(tmp_path) == pairs
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "captions.txt").write_text("0000.jpg, a red star, and more, of it\n\n")
    assert dataset.read_folder(tmp_path) == [(tmp_path / "0000.jpg", "a red star, and more, of it")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", b"", r"expected captions\.txt .* or dataset\.json .* found neither"),
        ("captions.txt", b"a.jpg, x\nb.jpg, y\n", r"2 of the listed images .*: a\.jpg, b\.jpg"),
        ("captions.txt", b"a.jpg a red star\n", r"line 1: expected `file, caption`, got"),
        ("captions.txt", b"\n", "has no pairs"),
        ("captions.txt", b"a.jpg, caf\xe9\n", "expected UTF-8, but byte 10 is not valid"),
        ("dataset.json", b"[{]", "not valid JSON"),
        ("dataset.json", b"{}", "expected a list of objects, got dict"),
        ("dataset.json", b'[{"image": "a.jpg"}]', r'item 0: expected \{"image_path"'),
    ],
)
def test_invalid_listings_are_rejected(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        dataset.read_folder(tmp_path)


def test_corrupt_image_is_named(tmp_path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    (folder / "0003.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"0003\.png"):
        train_folder(folder, tmp_path / "out", tmp_path / "s", settings(), TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 60}, "image size divisible by 8, got 60"),
        ({"width": 40}, "width divisible by 32, got 40"),
        ({"tower": "resnet", "image_size": 48}, "image size divisible by 32, got 48"),
        ({"tower": "resnet", "width": 5}, "an even width, got 5"),
    ],
)
def test_incompatible_sizes_are_rejected(tmp_path, changes, message) -> None:
    folder = write_pairs(tmp_path / "pairs")
    sizes = Sizes(**{"layers": 1, **changes})
    with pytest.raises(InputError, match=message):
        train_folder(folder, tmp_path / "out", tmp_path / "s", settings(), sizes)


def test_the_command_prints_one_json_document(tmp_path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    command = [sys.executable, "-m", "training", "folder", str(folder), "--output", "out"]
    command += ["--steps", "2", "--batch-size", "4", "--width", "32", "--layers", "1", "--json"]
    environment = {"PYTHONPATH": str(SHIPPED.parents[1]), "PATH": "/usr/bin"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(ended.stdout)["captions"] == 12
    command[4] = "nowhere"
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "found neither" in ended.stderr


def test_demo_checkpoint_has_a_model_card_with_its_numbers(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "TEST_SIZE", 64)
    monkeypatch.setattr(demo, "TEST_PICTURES", (87, 13, 10))
    short = demo.default_settings(steps=2, seed=3)
    output, state = tmp_path / "out", tmp_path / "s"
    report = demo.make_demo(output, state, short, pictures=300, workers=2, resume=False)
    card = (output / "README.md").read_text()
    assert f"| pairs held out | 13 | {report.held_out:.1%} |" in card
    assert "a green star" in card
    assert report.parameters < 1_400_000
    assert not state.exists()
    assert load_checkpoint(str(output)).templates == TEMPLATES


def test_command_draws_a_directory_of_labeled_images(tmp_path) -> None:
    drawn = typer.testing.CliRunner().invoke(
        app, ["pictures", str(tmp_path / "drawn"), "--count", "5", "--size", "32", "--json"]
    )
    assert json.loads(drawn.stdout)["images"] == 5
    assert len(dataset.read_folder(tmp_path / "drawn")) == 5
    labels = (tmp_path / "drawn" / "labels.txt").read_text().splitlines()
    assert labels == [shapes.label(pair) for pair in shapes.PAIRS]


@pytest.fixture(scope="module")
def shipped() -> Model:
    loaded = load_checkpoint(str(SHIPPED))
    assert loaded.templates == TEMPLATES
    return Model(loaded.clip, loaded.image, loaded.tokenizer, loaded.text)


def test_the_shipped_checkpoint_is_small() -> None:
    files = {path.name for path in SHIPPED.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 6_000_000


def test_the_shipped_checkpoint_equals_transformers(shipped) -> None:
    reference = transformers.CLIPModel.from_pretrained(SHIPPED).eval()
    drawn = [picture for picture, _ in shapes.draw_labelled(seed=11, count=20, size=64)]
    pixels = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in drawn])
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (IMAGE.mean, IMAGE.std))
    normalised = torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std)
    texts = captions()[:20]
    words = transformers.CLIPTokenizer.from_pretrained(SHIPPED)(
        texts, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        output = reference(pixel_values=normalised, **words)
    ours = embed_pixels(shipped, torch.from_numpy(pixels))
    torch.testing.assert_close(ours, output.image_embeds, atol=1e-5, rtol=0)
    ours = embed_texts(shipped, texts)
    torch.testing.assert_close(ours, output.text_embeds, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("pairs", "count", "bar"), [(shapes.SEEN, 348, 0.95), (shapes.HELD_OUT, 156, 0.75)]
)
def test_shipped_checkpoint_classifies_new_drawings(shipped, pairs, count, bar) -> None:
    assert zero_shot_accuracy(shipped, TEMPLATES, pairs, seed=77, count=count, size=192) >= bar
