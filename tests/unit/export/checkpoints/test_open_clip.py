"""OpenCLIP directories and files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.checkpoints.load import load_checkpoint
from tests.support.checkpoints import embeddings, refused
from tests.support.references import (
    openai_clip,
    some_pixels,
    unit,
)


def open_clip_document(model: torch.nn.Module, **vision) -> dict:
    """Save a directory as OpenCLIP's `push_to_hf_hub` writes it."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    size = model.visual.input_resolution
    return {
        "model_cfg": {
            "embed_dim": 32,
            "quick_gelu": True,
            "vision_cfg": {"image_size": size} | vision,
            "text_cfg": text,
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.25, 0.3],
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
    }


def save_open_clip(path: Path, model: torch.nn.Module, document: dict, *, prefix: str = "") -> None:
    path.mkdir(exist_ok=True)
    (path / "open_clip_config.json").write_text(json.dumps(document))
    state = {
        name if name.startswith("visual.") or name == "logit_scale" else prefix + name: t
        for name, t in model.state_dict().items()
    }
    save_file(state, path / "open_clip_model.safetensors")


@pytest.mark.parametrize("prefix", ["", "text."], ids=["CLIP", "CustomTextCLIP"])
def test_open_clip_directory_is_loaded(openai, prefix, tmp_path, vocabulary):
    model, (_, texts) = openai
    path = tmp_path / "open"
    save_open_clip(path, model, open_clip_document(model), prefix=prefix)
    checkpoint = load_checkpoint(str(path), vocabulary=vocabulary)
    np.testing.assert_allclose(embeddings(checkpoint)[1], texts, atol=1e-5)
    assert checkpoint.name == "open"
    assert checkpoint.image.mean == (0.5, 0.4, 0.3)
    assert checkpoint.image.std == (0.2, 0.25, 0.3)
    assert checkpoint.image.interpolation == "bilinear"
    assert checkpoint.image.pipeline == "openai"
    # The tower normalizes with the mean and std of the file.
    pixels = some_pixels(3, checkpoint.image.size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    with torch.inference_mode():
        images = unit(model.encode_image((torch.from_numpy(pixels) / 255 - mean) / std))
    np.testing.assert_allclose(embeddings(checkpoint)[0], images, atol=1e-5)


def test_open_clip_weights_file_finds_its_config(tmp_path, vocabulary):
    model = openai_clip("vit")
    save_open_clip(tmp_path / "open", model, open_clip_document(model))
    shutil.copy(vocabulary, tmp_path)
    checkpoint = load_checkpoint(
        str(tmp_path / "open" / "open_clip_model.safetensors"), vocabulary=vocabulary
    )
    assert checkpoint.clip.config.image.activation == "quick_gelu"
    assert checkpoint.image.interpolation == "bilinear"


def test_open_clip_activation_and_head_width_come_from_the_config(tmp_path, vocabulary):
    model = openai_clip("vit")
    document = open_clip_document(model, head_width=32)
    del document["model_cfg"]["quick_gelu"]  # OpenCLIP's default is GELU
    save_open_clip(tmp_path / "open", model, document)
    config = load_checkpoint(str(tmp_path / "open"), vocabulary=vocabulary).clip.config
    assert config.image.activation == config.text.activation == "gelu"
    assert config.image.heads == 4


def test_open_clip_timm_tower_is_rejected(tmp_path, vocabulary):
    model = openai_clip("vit")
    document = open_clip_document(model, timm_model_name="vit_base_patch16_siglip_224")
    save_open_clip(tmp_path / "open", model, document)
    message = refused(tmp_path / "open", vocabulary=vocabulary)
    assert "open_clip_config.json: vision_cfg has timm_model_name" in message
    assert "only ViT and ModifiedResNet towers" in message


def test_unsupported_open_clip_resize_mode_is_rejected(tmp_path, vocabulary):
    model = openai_clip("vit")
    document = open_clip_document(model)
    document["preprocess_cfg"]["resize_mode"] = "longest"
    save_open_clip(tmp_path / "open", model, document)
    message = refused(tmp_path / "open", vocabulary=vocabulary)
    assert "resize_mode is 'longest'; expected 'shortest' or 'squash'" in message


def test_open_clip_directory_without_weights_is_rejected(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    missing = "incomplete checkpoint: missing weights (open_clip_model.safetensors)"
    assert missing in refused(tmp_path)
