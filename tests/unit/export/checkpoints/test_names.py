"""Names of checkpoints, random weights, and saving."""

import shutil
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from export.checkpoints.architectures import ARCHITECTURES
from export.checkpoints.load import at_revision, load_checkpoint
from export.checkpoints.weight_names import save_checkpoint, to_layout
from serving.errors import CheckpointError
from tests.support.checkpoints import IDS, assert_same, embeddings, refused
from tests.support.references import (
    normalised,
    openai_clip,
    some_pixels,
)


def test_hub_id_is_loaded_from_the_local_cache(tiny_checkpoint, tmp_path, monkeypatch, expected):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--their-clip", "c" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_checkpoint, repository / "snapshots" / commit)
    checkpoint = load_checkpoint("someone/their-clip")
    assert_same(checkpoint, expected)
    assert (checkpoint.name, checkpoint.source) == ("their-clip", "someone/their-clip")


def test_revision_of_a_hub_id_is_loaded(tiny_checkpoint, tmp_path, monkeypatch, expected):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--their-clip", "d" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1.0").write_text(commit)
    shutil.copytree(tiny_checkpoint, repository / "snapshots" / commit)
    name = at_revision("someone/their-clip", "v1.0")
    checkpoint = load_checkpoint(name)
    assert_same(checkpoint, expected)
    assert (checkpoint.name, checkpoint.source) == ("their-clip", name)
    assert "revision 'v2'" in refused(at_revision("someone/their-clip", "v2"))
    for other in (str(tiny_checkpoint), "random:ViT-B-32", "ViT-B-32"):
        with pytest.raises(CheckpointError, match="not a Hugging Face id"):
            at_revision(other, "v1.0")


def test_uncached_hub_id_is_rejected_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("openai/clip-vit-base-patch32")
    assert "'openai/clip-vit-base-patch32' could not be downloaded from the Hugging Face hub" in (
        message
    )
    assert "give a local directory" in message


def test_hub_repository_without_weights_is_rejected(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--empty"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    snapshot = repository / "snapshots" / ("c" * 40)
    shutil.copytree(tiny_checkpoint, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    message = refused("someone/empty")
    assert "someone/empty has no weights" in message
    assert "model*.safetensors" in message


@pytest.mark.parametrize(
    ("name", "close"), [("ViT-B-33", "ViT-B/32"), ("RN51", "RN50"), ("random-ViT-L-14", "random:")]
)
def test_unknown_name_suggests_similar_names(name, close):
    message = refused(name)
    assert f"unknown checkpoint {name!r}" in message
    assert "did you mean" in message
    assert close in message
    assert "`clip-deploy list`" in message


def test_unknown_name_with_a_slash_suggests_similar_names(tmp_path, monkeypatch):
    """The name looks like a hub id, so it is looked up. The error still suggests the likely
    name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("ViT-B/33")
    assert "could not be downloaded" in message
    assert "did you mean ViT-B/32" in message


def test_unknown_path_gets_no_suggestion():
    message = refused("/no/such/path.pt")
    assert "unknown checkpoint '/no/such/path.pt'" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("name", ["random:ViT-B-33", "random:", "random:RN50@x", "random:RN50@-1"])
def test_unknown_random_architecture_is_rejected(name):
    message = refused(name)
    assert repr(name) in message
    assert "ViT-B-32" in message
    assert "RN50x64" in message


@pytest.fixture
def tiny_architecture(monkeypatch, tiny_checkpoint):
    config = load_checkpoint(str(tiny_checkpoint)).clip.config
    text = replace(config.text, vocab_size=600, end_id=599)
    monkeypatch.setitem(ARCHITECTURES, "ViT-T-8", replace(config, text=text))


def test_random_weights_are_seeded(tiny_architecture):
    before = torch.random.get_rng_state()
    first, second, other = map(
        load_checkpoint, ("random:ViT-T-8", "random:ViT-T-8@0", "random:ViT-T-8@1")
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.weights_sha256 == second.weights_sha256 != other.weights_sha256
    for name, tensor in first.clip.state_dict().items():
        assert torch.equal(tensor, second.clip.state_dict()[name]), name
    assert not torch.equal(
        first.clip.text.token_embedding.weight, other.clip.text.token_embedding.weight
    )
    assert (first.weights, first.name) == ("random", "random-ViT-T-8")
    assert (first.text.start_id, first.text.end_id) == (598, 599)


def test_random_weights_accept_a_real_vocabulary(monkeypatch, tiny_checkpoint, vocabulary):
    config = load_checkpoint(str(tiny_checkpoint)).clip.config
    monkeypatch.setitem(ARCHITECTURES, "ViT-T-8", config)
    checkpoint = load_checkpoint("random:ViT-T-8", vocabulary=vocabulary)
    assert checkpoint.tokenizer.encode("a cat").ids == [49406, 320, 2368, 49407]


@pytest.mark.parametrize(
    ("name", "millions"),
    # Radford et al. do not print totals. These are the totals of the published files.
    [
        ("ViT-B-32", 151.28),
        ("ViT-B-16", 149.62),
        ("ViT-L-14", 427.62),
        ("RN50", 102.01),
        ("RN101", 119.69),
        ("RN50x4", 178.3),
        ("ViT-H-14", 986.11),
        ("ViT-bigG-14", 2539.57),
    ],
)
def test_known_architectures_have_the_published_number_of_parameters(name, millions):
    from export.pipeline import count_parameters

    assert count_parameters(ARCHITECTURES[name]) / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_saved_vit_loads_in_transformers(tiny_checkpoint, tmp_path, expected):
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    templates = ("a {}.", "the {}.")
    save_checkpoint(
        tmp_path, checkpoint.clip, checkpoint.image, checkpoint.tokenizer, templates=templates
    )
    assert {file.name for file in tmp_path.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
    }
    theirs = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        out = theirs(
            input_ids=torch.from_numpy(IDS).long(), pixel_values=normalised(some_pixels(3, 32))
        )
    np.testing.assert_allclose(out.image_embeds.numpy(), expected[0], atol=1e-6)
    np.testing.assert_allclose(out.text_embeds.numpy(), expected[1], atol=1e-6)
    assert theirs.logit_scale.exp().item() == pytest.approx(20)
    assert CLIPTokenizer.from_pretrained(tmp_path)("a cat")["input_ids"] == [
        49406,
        320,
        2368,
        49407,
    ]
    again = load_checkpoint(str(tmp_path))
    assert again.templates == templates
    assert again.image == checkpoint.image
    assert again.text == checkpoint.text
    assert_same(again, expected)


def test_a_saved_resnet_loads_again_and_in_openais_code(tmp_path, vocabulary):
    model = openai_clip("resnet")
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    checkpoint = load_checkpoint(
        str(tmp_path / "mine.pt"), vocabulary=vocabulary, activation="quick_gelu"
    )
    path = tmp_path / "saved"
    save_checkpoint(path, checkpoint.clip, checkpoint.image, checkpoint.tokenizer, ["one {}"])
    again = load_checkpoint(str(path))
    assert_same(again, embeddings(checkpoint), tolerance=0)
    assert again.templates == ("one {}",)
    assert again.image == checkpoint.image
    assert again.clip.config == checkpoint.clip.config
    saved = load_file(path / "open_clip_model.safetensors")
    strict = model.load_state_dict(saved, strict=False)
    assert not strict.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in strict.missing_keys)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_openai_layout_round_trip_keeps_the_weights(kind, tmp_path, vocabulary):
    state = openai_clip(kind).state_dict()
    torch.save(state, tmp_path / "mine.pt")
    checkpoint = load_checkpoint(
        str(tmp_path / "mine.pt"), vocabulary=vocabulary, activation="quick_gelu"
    )
    written = to_layout(checkpoint.clip, "openai")
    assert written.keys() == {n for n in state if not n.endswith("num_batches_tracked")}
    for name, tensor in written.items():
        assert torch.equal(tensor, state[name]), name
