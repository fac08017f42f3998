"""Valid and invalid Hugging Face directories."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from export.checkpoints.load import load_checkpoint
from export.checkpoints.vocabulary import byte_tokenizer
from serving.bundles.manifest import DEFAULT_TEMPLATES
from tests.support.checkpoints import assert_same, refused
from tests.support.references import (
    MEAN,
    STD,
    openai_module,
)


@pytest.fixture
def copy(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that tests may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "spoiled"))


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_hugging_face_directory_is_loaded(tiny_checkpoint, expected):
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    assert_same(checkpoint, expected)
    assert checkpoint.name == "tiny-clip"
    assert checkpoint.source == str(tiny_checkpoint)
    assert checkpoint.weights == "trained"
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert checkpoint.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert checkpoint.templates == DEFAULT_TEMPLATES
    assert (checkpoint.image.size, checkpoint.image.resize) == (32, 32)
    assert checkpoint.image.interpolation == "bicubic"
    assert checkpoint.image.pipeline == "huggingface"
    assert checkpoint.image.mean == pytest.approx(MEAN)
    assert checkpoint.image.std == pytest.approx(STD)
    text = checkpoint.text
    assert (text.context_length, text.vocab_size) == (77, 49408)
    assert (text.start_id, text.end_id) == (49406, 49407)
    assert checkpoint.clip.logit_scale.exp().item() == pytest.approx(20)
    assert not checkpoint.clip.training


def test_relative_path_gets_the_name_of_the_directory(tiny_checkpoint, monkeypatch):
    """The name becomes a directory below artifacts/, so "." would mean artifacts/ itself."""
    monkeypatch.chdir(tiny_checkpoint)
    assert load_checkpoint(".").name == "tiny-clip"
    assert load_checkpoint(f"{tiny_checkpoint}/").name == "tiny-clip"
    (tiny_checkpoint.parent / "beside").mkdir(exist_ok=True)
    monkeypatch.chdir(tiny_checkpoint.parent / "beside")
    assert load_checkpoint("../tiny-clip/.").name == "tiny-clip"


def test_sharded_safetensors_are_loaded(transformers_model, tiny_checkpoint, tmp_path, expected):
    transformers_model.save_pretrained(tmp_path, max_shard_size="5MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for name in ("preprocessor_config.json", "tokenizer.json"):
        shutil.copy(tiny_checkpoint / name, tmp_path)
    assert_same(load_checkpoint(str(tmp_path)), expected)


def test_missing_shard_is_rejected(transformers_model, tiny_checkpoint, tmp_path):
    transformers_model.save_pretrained(tmp_path, max_shard_size="5MB")
    for name in ("preprocessor_config.json", "tokenizer.json"):
        shutil.copy(tiny_checkpoint / name, tmp_path)
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    assert f"{shard}: a weights file is missing" in refused(tmp_path)


def test_index_without_weight_map_is_rejected(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text('{"metadata": {}}')
    message = refused(copy)
    assert "model.safetensors.index.json" in message
    assert "weight_map" in message


def test_pickled_weights_are_loaded(copy, expected):
    state = load_file(copy / "model.safetensors")
    # Older files have a constant buffer beside the weights.
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(state, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert_same(load_checkpoint(str(copy)), expected)


def test_half_precision_weights_become_float32(copy, expected):
    state = load_file(copy / "model.safetensors")
    save_file({name: t.half() for name, t in state.items()}, copy / "model.safetensors")
    checkpoint = load_checkpoint(str(copy))
    assert {t.dtype for t in checkpoint.clip.parameters()} == {torch.float32}
    assert_same(checkpoint, expected, tolerance=1e-2)


def test_vocabulary_and_merges_replace_a_tokenizer_file(copy, vocabulary):
    vocab = json.loads((copy / "tokenizer.json").read_text())["model"]
    (copy / "vocab.json").write_text(json.dumps(vocab["vocab"]))
    pairs = (" ".join(pair) if isinstance(pair, list) else pair for pair in vocab["merges"])
    (copy / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    (copy / "tokenizer.json").unlink()
    tokenizer = load_checkpoint(str(copy)).tokenizer
    theirs = CLIPTokenizer.from_pretrained(copy)
    openai = openai_module("simple_tokenizer").SimpleTokenizer(str(vocabulary))
    for text in ("a photo of a cat", "naïve café 12:30, it's 猫 😀"):
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text)["input_ids"] == [49406, *openai.encode(text), 49407]


def test_processor_config_replaces_preprocessor_config(copy, tiny_checkpoint):
    document = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": document}))
    assert load_checkpoint(str(copy)).image == load_checkpoint(str(tiny_checkpoint)).image


def test_prompt_templates_are_read_from_the_config(copy):
    edit(copy / "config.json", lambda d: d.update(prompt_templates=["a {}", "one {}"]))
    assert load_checkpoint(str(copy)).templates == ("a {}", "one {}")


def test_vocabulary_option_replaces_the_tokenizer(copy, vocabulary):
    byte_tokenizer(514).save(str(copy / "tokenizer.json"))
    assert load_checkpoint(str(copy), vocabulary=vocabulary).text.end_id == 49407


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("model.safetensors", "incomplete checkpoint: missing weights (model.safetensors)"),
        ("preprocessor_config.json", "incomplete checkpoint: missing preprocessor_config.json"),
        ("tokenizer.json", "incomplete checkpoint: missing tokenizer.json"),
        ("config.json", "no config.json (Hugging Face) and no open_clip_config.json (OpenCLIP)"),
    ],
)
def test_incomplete_checkpoint_is_rejected(copy, file, shown):
    (copy / file).unlink()
    assert f"{copy}: {shown}" in refused(copy)


def test_vocabulary_without_merges_is_rejected(copy):
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    assert "incomplete checkpoint: missing tokenizer.json" in refused(copy)


def test_mismatched_shapes_are_both_named(copy):
    edit(copy / "config.json", lambda d: d["text_config"].update(intermediate_size=128))
    message = refused(copy)
    assert "fc1" in message or "fc2" in message
    assert re.search(r"has shape \[(256, 64|256|64, 256)\]", message)
    assert re.search(r"needs \[(128, 64|128|64, 128)\]", message)
    assert "configuration and weights may be of different models" in message


def test_missing_and_unknown_weights_are_named(copy):
    state = load_file(copy / "model.safetensors")
    del state["visual_projection.weight"]
    state["text_model.adapter.weight"] = torch.zeros(1)
    save_file(state, copy / "model.safetensors")
    message = refused(copy)
    assert "1 missing (visual_projection.weight)" in message
    assert "1 unknown (text_model.adapter.weight)" in message


def test_truncated_safetensors_file_is_rejected(copy):
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    message = refused(copy)
    assert str(file) in message
    assert "not a complete safetensors file" in message
    assert "download it again" in message


def test_other_model_type_is_rejected(copy):
    edit(copy / "config.json", lambda d: d.update(model_type="siglip"))
    assert "config.json has model_type 'siglip'; expected 'clip'" in refused(copy)


def test_unsupported_activation_is_rejected(copy):
    edit(copy / "config.json", lambda d: d["vision_config"].update(hidden_act="swish"))
    assert "activation 'swish' is not supported; expected quick_gelu or gelu" in refused(copy)


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "wide"}, {"num_attention_heads": 3}, {"num_attention_heads": 0}],
    ids=str,
)
def test_invalid_sizes_are_rejected(copy, section, change):
    edit(copy / "config.json", lambda d: d[section].update(change))
    assert "config.json" in refused(copy)


def test_zero_patch_size_is_rejected(copy):
    edit(copy / "config.json", lambda d: d["vision_config"].update(patch_size=0))
    assert "config.json" in refused(copy)


def test_invalid_json_is_rejected(copy):
    (copy / "config.json").write_text('{"model_type": "clip",')
    assert f"{copy / 'config.json'}: not readable as JSON" in refused(copy)
    (copy / "config.json").write_text("[]")
    assert "expected a JSON object, found list" in refused(copy)


def test_crop_size_unlike_the_tower_is_rejected(copy):
    side = {"height": 64, "width": 64}
    edit(copy / "preprocessor_config.json", lambda d: d.update(crop_size=side))
    assert "images are cropped to 64 px, but the image tower takes 32 px" in refused(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 32, "width": 48}},
        {"resample": 5},
        {"image_mean": None},
        {"image_std": [1, 1]},
        {"do_normalize": False},
    ],
    ids=str,
)
def test_unsupported_processor_is_rejected(copy, change):
    edit(copy / "preprocessor_config.json", lambda d: d.update(change))
    message = refused(copy)
    assert "preprocessor_config.json" in message
    assert "expected a CLIPImageProcessor" in message


def test_tokenizer_of_another_vocabulary_is_rejected(copy):
    byte_tokenizer(514).save(str(copy / "tokenizer.json"))
    message = refused(copy)
    assert "the tokenizer's <|endoftext|> is 513" in message
    assert "the text tower pools at 49407" in message


def test_unreadable_tokenizer_is_rejected(copy):
    (copy / "tokenizer.json").write_text("{}")
    assert f"{copy / 'tokenizer.json'}: not a readable tokenizer" in refused(copy)
