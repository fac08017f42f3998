"""Checkpoints as trainers and converters save them: wrapped, prefixed, sharded, renamed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.configs import config_from_openai
from export.checkpoints.load import load_checkpoint
from tests.support.checkpoints import assert_same, embeddings, refused
from tests.support.references import openai_clip

PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "model.", "clip.")


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "step": 70, "loss": 0.5},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "global_step": 5},
    "DistributedDataParallel": lambda state: {"state_dict": prefixed(state, "module.")},
}


@pytest.fixture
def directory(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny Hugging Face checkpoint."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ------------------------------------------------------------------ wrapped weights


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_weights_beside_the_state_of_a_training_are_found(openai, wrapping, tmp_path, vocabulary):
    model, expected = openai
    file = tmp_path / "last.pt"
    torch.save(WRAPPED[wrapping](model.state_dict()), file)
    loaded = load_checkpoint(str(file), vocabulary=vocabulary, activation="quick_gelu")
    np.testing.assert_allclose(embeddings(loaded)[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_removed(directory, expected, prefix):
    file = directory / "model.safetensors"
    state = load_file(file)
    file.unlink()
    save_file(prefixed(state, prefix), file)
    assert_same(load_checkpoint(str(directory)), expected)


def test_logit_scale_of_shape_1_is_a_scalar(directory, expected):
    file = directory / "model.safetensors"
    state = load_file(file)
    state["logit_scale"] = state["logit_scale"].reshape(1)
    file.unlink()
    save_file(state, file)
    loaded = load_checkpoint(str(directory))
    assert_same(loaded, expected)
    assert loaded.clip.logit_scale.exp().item() == pytest.approx(20)


def test_sharded_pickles_are_loaded(directory, expected):
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(state)
    shards = {f"pytorch_model-{n:05d}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for file, members in shards.items():
        torch.save({name: state[name] for name in members}, directory / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(load_checkpoint(str(directory)), expected)


def test_file_in_hugging_face_layout_uses_the_config_next_to_it(directory, expected):
    tuned = directory / "finetuned.pt"
    torch.save({"state_dict": load_file(directory / "model.safetensors")}, tuned)
    (directory / "model.safetensors").unlink()
    loaded = load_checkpoint(str(tuned))
    assert_same(loaded, expected)
    assert loaded.image.pipeline == "huggingface"
    (directory / "config.json").unlink()
    assert "no config.json next to it" in refused(tuned)


# ------------------------------------------------------------------ adapters


def test_unmerged_lora_is_refused(directory):
    file = directory / "model.safetensors"
    state = load_file(file)
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    state[f"{name}.lora_A.default.weight"] = torch.zeros(4, 64)
    state[f"{name}.lora_B.default.weight"] = torch.zeros(64, 4)
    file.unlink()
    save_file(state, file)
    message = refused(directory)
    assert f"{name}.lora_A.default.weight" in message
    assert "merge it first" in message


def test_peft_adapter_beside_the_weights_is_refused(directory):
    """transformers loads it together with the base weights, so ignoring it would be wrong."""
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = refused(directory)
    assert "adapter_config.json" in message
    assert "merge it first" in message


# ------------------------------------------------------------------ Hugging Face directories


def test_tokenizer_is_not_needed_with_a_vocabulary(directory, expected, vocabulary):
    (directory / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(directory)
    assert_same(load_checkpoint(str(directory), vocabulary=vocabulary), expected)


@pytest.mark.parametrize("key", ["image_mean", "image_std"])
def test_one_number_stands_for_every_channel(directory, key):
    edit(directory / "preprocessor_config.json", **{key: 0.5})
    spec = load_checkpoint(str(directory)).image
    assert (spec.mean if key == "image_mean" else spec.std) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("crop", [False, True])
def test_square_size_squashes(directory, crop):
    file = directory / "preprocessor_config.json"
    edit(file, size={"height": 32, "width": 32}, do_center_crop=crop)
    spec = load_checkpoint(str(directory)).image
    assert (spec.resize_mode, spec.resize, spec.size) == ("squash", 32, 32)
    edit(file, size={"height": 32, "width": 48})
    assert "not square" in refused(directory)


# ------------------------------------------------------------------ OpenCLIP directories

VISION = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "resize_mode": "shortest"}


@pytest.fixture(scope="module")
def model():
    return openai_clip("vit")


def save(path, model, *, weights="open_clip_model.safetensors", vision=(), text=(), **preprocess):
    cfg = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": VISION | dict(vision),
        "text_cfg": TEXT | dict(text),
    }
    document = {"model_cfg": cfg, "preprocess_cfg": PREPROCESS | preprocess}
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps(document))
    state = dict(model.state_dict())
    if weights.endswith(".safetensors"):
        save_file(state, path / weights)
    else:
        torch.save(state, path / weights)
    return path


@pytest.mark.parametrize(
    "weights",
    [
        *("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
        *("open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_every_name_of_open_clip_weights_is_found(model, weights, tmp_path, vocabulary):
    path = save(tmp_path / "open", model, weights=weights)
    assert load_checkpoint(str(path), vocabulary=vocabulary).image.mean == (0.5, 0.4, 0.3)


def test_config_of_another_kind_of_model_is_ignored(model, tmp_path, vocabulary):
    path = save(tmp_path / "open", model)
    (path / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224"}')
    assert load_checkpoint(str(path), vocabulary=vocabulary).image.pipeline == "openai"


def test_flat_config_is_read(model, tmp_path, vocabulary):
    """The files in open_clip's own `model_configs` have no `model_cfg`."""
    path = save(tmp_path / "open", model, vision={"head_width": 32})
    document = json.loads((path / "open_clip_config.json").read_text())
    flat = document["model_cfg"] | {"preprocess_cfg": document["preprocess_cfg"]}
    (path / "open_clip_config.json").write_text(json.dumps(flat))
    config = load_checkpoint(str(path), vocabulary=vocabulary).clip.config
    assert config.image.activation == config.text.activation == "quick_gelu"
    assert config.image.heads == 4


@pytest.mark.parametrize("document", [{}, {"model_cfg": {}}, {"model_cfg": {"vision_cfg": {}}}])
def test_config_without_towers_is_refused(model, document, tmp_path, vocabulary):
    path = save(tmp_path / "open", model)
    (path / "open_clip_config.json").write_text(json.dumps(document))
    assert "expected model_cfg with vision_cfg and text_cfg" in refused(path, vocabulary=vocabulary)


def test_keys_without_effect_are_accepted(model, tmp_path, vocabulary):
    vision = {"patch_dropout": 0.5, "pool_type": "tok", "no_ln_pre": False, "norm_kwargs": {}}
    text = {"pool_type": "argmax", "proj_type": "linear", "embed_cls": False, "pad_id": 0}
    path = save(tmp_path / "open", model, vision=vision, text=text)
    assert load_checkpoint(str(path), vocabulary=vocabulary).clip.config.image.heads == 2


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision", "pool_type", "avg"),
        ("vision", "no_ln_pre", True),
        ("vision", "pos_embed_type", "sin_cos_2d"),
        ("text", "pool_type", "last"),
        ("text", "no_causal_mask", True),
        ("text", "tokenizer_mode", "canonicalize"),
    ],
)
def test_keys_with_an_effect_are_refused(model, section, key, value, tmp_path, vocabulary):
    path = save(tmp_path / "open", model, **{section: {key: value}})
    assert f"{section}_cfg has {key}" in refused(path, vocabulary=vocabulary)


@pytest.mark.parametrize(("name", "used"), [("random", "bicubic"), ("bilinear", "bilinear")])
def test_interpolation_is_that_of_inference(model, name, used, tmp_path, vocabulary):
    path = save(tmp_path / "open", model, interpolation=name, mean=0.5, resize_mode="squash")
    spec = load_checkpoint(str(path), vocabulary=vocabulary).image
    assert (spec.interpolation, spec.mean) == (used, (0.5, 0.5, 0.5))
    assert spec.resize_mode == "squash"


# ------------------------------------------------------------------ weights without a configuration


@pytest.mark.parametrize(
    ("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)]
)
def test_heads_of_published_widths(model, width, heads):
    """ViT-B, L, H, g and bigG of open_clip 3.3 (model_configs): 12 heads, then 16."""
    state = dict(model.state_dict())
    state["visual.conv1.weight"] = torch.empty(width, 3, 8, 8)
    assert config_from_openai(state, "gelu").image.heads == heads
