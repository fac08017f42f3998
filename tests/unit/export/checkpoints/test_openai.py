"""OpenAI's files, and weights files with other contents."""

import hashlib
import os
import pickle
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

import export.checkpoints.load
from export.checkpoints.architectures import KNOWN_MODELS, KnownModel
from export.checkpoints.load import load_checkpoint
from tests.support.checkpoints import IDS, assert_same, refused
from tests.support.references import (
    normalised,
    openai_clip,
    some_pixels,
    unit,
)


def save_torchscript(model: torch.nn.Module, path: Path) -> None:
    """Save a traced module that holds its sizes as buffers, like OpenAI's files."""
    for name, value in (
        ("input_resolution", model.visual.input_resolution),
        ("context_length", 77),
        ("vocab_size", 49408),
    ):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    size = int(model.input_resolution)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(
            model, (torch.zeros(1, 3, size, size), torch.zeros(1, 77, dtype=torch.long))
        )
        torch.jit.save(traced, path)


def test_openai_torchscript_archive_is_loaded(tmp_path, vocabulary):
    model = openai_clip("vit", seed=5)
    with torch.inference_mode():
        images = unit(model.encode_image(normalised(some_pixels(3, 32))))
        texts = unit(model.encode_text(torch.from_numpy(IDS)))
    path = tmp_path / "mine.pt"
    save_torchscript(model, path)
    checkpoint = load_checkpoint(str(path), vocabulary=vocabulary, activation="quick_gelu")
    assert_same(checkpoint, (images, texts))
    assert checkpoint.name == "mine"
    assert checkpoint.image.pipeline == "openai"
    assert checkpoint.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_openai_state_dict_is_loaded(openai, tmp_path, vocabulary):
    model, wanted = openai
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    checkpoint = load_checkpoint(
        str(tmp_path / "mine.pt"), vocabulary=vocabulary, activation="quick_gelu"
    )
    assert_same(checkpoint, wanted)
    assert checkpoint.image.size == checkpoint.image.resize == model.visual.input_resolution


def test_wrapped_state_dict_is_loaded(openai, tmp_path, vocabulary):
    """Training loops save the state dict under a key, and DataParallel prefixes each name."""
    model, wanted = openai
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    name = str(tmp_path / "epoch_3.pt")
    assert_same(load_checkpoint(name, vocabulary=vocabulary, activation="quick_gelu"), wanted)


def test_bare_weights_require_the_activation_option(openai, tmp_path, vocabulary):
    torch.save(openai[0].state_dict(), tmp_path / "mine.pt")
    message = refused(tmp_path / "mine.pt", vocabulary=vocabulary)
    assert "the weights do not tell the activation function" in message
    assert "--activation quick_gelu" in message


def test_bare_weights_require_the_vocabulary_option_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    torch.save(openai_clip("vit").state_dict(), tmp_path / "mine.pt")
    message = refused(tmp_path / "mine.pt", activation="gelu")
    assert "the checkpoint has no tokenizer" in message
    assert "--vocabulary FILE" in message


def test_other_contents_under_an_openai_file_name_are_rejected(tmp_path, vocabulary):
    torch.save(openai_clip("vit").state_dict(), tmp_path / "ViT-B-32.pt")
    message = refused(tmp_path / "ViT-B-32.pt", vocabulary=vocabulary, activation="quick_gelu")
    assert "has the name of OpenAI's ViT-B/32" in message
    assert "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af" in message
    assert hashlib.sha256((tmp_path / "ViT-B-32.pt").read_bytes()).hexdigest() in message


def publish(monkeypatch, tmp_path: Path, *, contents: bytes | None = None) -> Path:
    """Register a tiny "ViT-T/8" as a known model, and put its file into the cache."""
    made = tmp_path / "made.pt"
    torch.save(openai_clip("vit").state_dict(), made)
    sha256 = hashlib.sha256(made.read_bytes()).hexdigest()
    known = KnownModel(
        name="ViT-T/8",
        architecture="ViT-B-32",
        source=f"https://example.invalid/{sha256}/ViT-T-8.pt",
        sha256=sha256,
    )
    for module in (export.checkpoints.load, export.checkpoints.layouts):
        monkeypatch.setattr(module, "KNOWN_MODELS", (*KNOWN_MODELS, known))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    cached = tmp_path / "home" / "clip-deploy" / sha256[:12] / "ViT-T-8.pt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(made.read_bytes() if contents is None else contents)
    return cached


def test_known_name_is_loaded_from_the_cache(tmp_path, monkeypatch, vocabulary):
    cached = publish(monkeypatch, tmp_path)
    checkpoint = load_checkpoint("ViT-T/8", vocabulary=vocabulary)
    assert checkpoint.clip.config.text.activation == "quick_gelu"
    assert (checkpoint.name, checkpoint.source) == ("ViT-T-8", "ViT-T/8")
    # The path of the same file is recognized by its contents.
    assert load_checkpoint(str(cached), vocabulary=vocabulary).weights_sha256 == (
        checkpoint.weights_sha256
    )


def test_damaged_cached_file_is_rejected(tmp_path, monkeypatch, vocabulary):
    cached = publish(monkeypatch, tmp_path, contents=b"half of it")
    message = refused("ViT-T/8", vocabulary=vocabulary)
    assert f"{cached} has sha256 {hashlib.sha256(b'half of it').hexdigest()}" in message
    assert "delete it and try again" in message


def test_uncached_known_name_is_rejected_offline(tmp_path, monkeypatch, vocabulary):
    publish(monkeypatch, tmp_path).unlink()
    message = refused("ViT-T/8", vocabulary=vocabulary)
    assert "https://example.invalid/" in message
    assert "HF_HUB_OFFLINE is set; put the file at" in message


class Attack:
    """An object that runs the file author's code when it is unpickled without restrictions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "plain"])
def test_pickle_with_code_is_rejected_and_does_not_run(form, tmp_path, vocabulary):
    path, marker = tmp_path / "trap.pt", tmp_path / "ran"
    content = {"state_dict": {"logit_scale": torch.ones(())}, "extra": Attack(marker)}
    if form == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    message = refused(path, vocabulary=vocabulary, activation="gelu")
    assert f"{path}: not loaded: " in message
    assert "weights_only=True" in message
    assert "convert it to safetensors" in message
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
def test_text_file_as_weights_is_rejected(suffix, tmp_path, vocabulary):
    path = (tmp_path / "weights").with_suffix(suffix)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    message = refused(path, vocabulary=vocabulary, activation="gelu")
    assert f"{path}: not a PyTorch file (neither a zip archive nor a pickle)" in message


def test_empty_weights_file_is_rejected(tmp_path, vocabulary):
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).touch()
        assert str(tmp_path / name) in refused(
            tmp_path / name, vocabulary=vocabulary, activation="gelu"
        )


def test_damaged_torchscript_archive_is_rejected(tmp_path, vocabulary):
    import zipfile

    path = tmp_path / "broken.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("broken/constants.pkl", b"\x80\x02).")
    message = refused(path, vocabulary=vocabulary, activation="gelu")
    assert str(path) in message
    assert "TorchScript" in message


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"state_dict": None}], ids=str)
def test_pickle_without_tensors_is_rejected(content, tmp_path, vocabulary):
    torch.save(content, tmp_path / "other.pt")
    message = refused(tmp_path / "other.pt", vocabulary=vocabulary, activation="gelu")
    assert "expected a dictionary of tensors (a state dict)" in message


def test_tensors_of_another_model_are_rejected(tmp_path, vocabulary):
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    message = refused(tmp_path / "other.safetensors", vocabulary=vocabulary, activation="gelu")
    assert "not" in message
    assert "CLIP" in message
