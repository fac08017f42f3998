"""Every layout a checkpoint comes in, and every way one can be wrong."""

import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

import export.checkpoints.load
from export.checkpoints.architectures import ARCHITECTURES, KNOWN_MODELS, KnownModel
from export.checkpoints.load import load_checkpoint
from export.checkpoints.vocabulary import byte_tokenizer
from export.checkpoints.weight_names import save_checkpoint, to_layout
from serving.bundles.manifest import DEFAULT_TEMPLATES
from serving.errors import CheckpointError
from tests.support.references import (
    MEAN,
    STD,
    normalised,
    openai_clip,
    openai_module,
    some_ids,
    some_pixels,
    unit,
)

IDS = some_ids([1, 5, 76])


def embeddings(checkpoint) -> tuple[np.ndarray, np.ndarray]:
    pixels = some_pixels(3, checkpoint.image.size)
    with torch.inference_mode():
        return (
            checkpoint.clip.image(torch.from_numpy(pixels)).numpy(),
            checkpoint.clip.text(torch.from_numpy(IDS)).numpy(),
        )


def assert_same(checkpoint, expected, tolerance: float = 1e-5) -> None:
    for got, want in zip(embeddings(checkpoint), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance)


@pytest.fixture
def copy(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be spoiled."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "spoiled"))


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def refused(name, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(name), **options)
    return str(caught.value)


# ------------------------------------------------------------------ Hugging Face directories


@pytest.fixture(scope="module")
def transformers_model(tiny_checkpoint):
    return CLIPModel.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture(scope="module")
def expected(transformers_model):
    with torch.inference_mode():
        out = transformers_model(
            input_ids=torch.from_numpy(IDS).long(), pixel_values=normalised(some_pixels(3, 32))
        )
    return out.image_embeds.numpy(), out.text_embeds.numpy()


def test_hugging_face_directory(tiny_checkpoint, expected):
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


def test_a_directory_is_named_even_when_it_is_given_as_a_dot(tiny_checkpoint, monkeypatch):
    """The name is a directory below artifacts/: "." would be artifacts/ itself."""
    monkeypatch.chdir(tiny_checkpoint)
    assert load_checkpoint(".").name == "tiny-clip"
    assert load_checkpoint(f"{tiny_checkpoint}/").name == "tiny-clip"
    (tiny_checkpoint.parent / "beside").mkdir(exist_ok=True)
    monkeypatch.chdir(tiny_checkpoint.parent / "beside")
    assert load_checkpoint("../tiny-clip/.").name == "tiny-clip"


def test_sharded_safetensors(transformers_model, tiny_checkpoint, tmp_path, expected):
    transformers_model.save_pretrained(tmp_path, max_shard_size="5MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for name in ("preprocessor_config.json", "tokenizer.json"):
        shutil.copy(tiny_checkpoint / name, tmp_path)
    assert_same(load_checkpoint(str(tmp_path)), expected)


def test_a_missing_shard(transformers_model, tiny_checkpoint, tmp_path):
    transformers_model.save_pretrained(tmp_path, max_shard_size="5MB")
    for name in ("preprocessor_config.json", "tokenizer.json"):
        shutil.copy(tiny_checkpoint / name, tmp_path)
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    assert f"{shard}: a part of the weights is not there" in refused(tmp_path)


def test_an_index_without_a_map(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text('{"metadata": {}}')
    message = refused(copy)
    assert "model.safetensors.index.json" in message
    assert "weight_map" in message


def test_pickled_weights(copy, expected):
    state = load_file(copy / "model.safetensors")
    # As older files have them: a constant buffer beside the weights, and old-style half precision.
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


def test_vocabulary_and_merges_instead_of_a_tokenizer_file(copy, vocabulary):
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


def test_processor_config_instead_of_preprocessor_config(copy, tiny_checkpoint):
    document = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": document}))
    assert load_checkpoint(str(copy)).image == load_checkpoint(str(tiny_checkpoint)).image


def test_prompt_templates_of_the_config(copy):
    edit(copy / "config.json", lambda d: d.update(prompt_templates=["a {}", "one {}"]))
    assert load_checkpoint(str(copy)).templates == ("a {}", "one {}")


def test_a_vocabulary_given_beside_the_directory(copy, vocabulary):
    byte_tokenizer(514).save(str(copy / "tokenizer.json"))
    assert load_checkpoint(str(copy), vocabulary=vocabulary).text.end_id == 49407


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("model.safetensors", "half a checkpoint: weights (model.safetensors) not there"),
        ("preprocessor_config.json", "half a checkpoint: preprocessor_config.json not there"),
        ("tokenizer.json", "half a checkpoint: tokenizer.json not there"),
        ("config.json", "no config.json (Hugging Face) and no open_clip_config.json (OpenCLIP)"),
    ],
)
def test_half_a_checkpoint(copy, file, shown):
    (copy / file).unlink()
    assert f"{copy}: {shown}" in refused(copy)


def test_half_a_vocabulary(copy):
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    assert "half a checkpoint: tokenizer.json not there" in refused(copy)


def test_wrong_shapes_name_both(copy):
    edit(copy / "config.json", lambda d: d["text_config"].update(intermediate_size=128))
    message = refused(copy)
    assert "fc1" in message or "fc2" in message
    assert re.search(r"has shape \[(256, 64|256|64, 256)\]", message)
    assert re.search(r"ask for \[(128, 64|128|64, 128)\]", message)
    assert "config.json and weights may be of different models" in message


def test_missing_and_superfluous_weights_are_named(copy):
    state = load_file(copy / "model.safetensors")
    del state["visual_projection.weight"]
    state["text_model.adapter.weight"] = torch.zeros(1)
    save_file(state, copy / "model.safetensors")
    message = refused(copy)
    assert "1 missing (visual_projection.weight)" in message
    assert "1 not known (text_model.adapter.weight)" in message


def test_a_truncated_safetensors_file(copy):
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    message = refused(copy)
    assert str(file) in message
    assert "not a whole safetensors file" in message
    assert "download it again" in message


def test_another_model_type(copy):
    edit(copy / "config.json", lambda d: d.update(model_type="siglip"))
    assert "config.json is of model_type 'siglip'; expected 'clip'" in refused(copy)


def test_an_activation_that_is_not_supported(copy):
    edit(copy / "config.json", lambda d: d["vision_config"].update(hidden_act="swish"))
    assert "activation 'swish' is not supported; expected quick_gelu or gelu" in refused(copy)


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "wide"}, {"num_attention_heads": 3}, {"num_attention_heads": 0}],
    ids=str,
)
def test_sizes_that_make_no_sense(copy, section, change):
    edit(copy / "config.json", lambda d: d[section].update(change))
    assert "config.json" in refused(copy)


def test_a_patch_size_of_zero(copy):
    edit(copy / "config.json", lambda d: d["vision_config"].update(patch_size=0))
    assert "config.json" in refused(copy)


def test_broken_json(copy):
    (copy / "config.json").write_text('{"model_type": "clip",')
    assert f"{copy / 'config.json'}: not readable as JSON" in refused(copy)
    (copy / "config.json").write_text("[]")
    assert "expected a JSON object, found list" in refused(copy)


def test_pictures_of_another_size_than_the_tower(copy):
    side = {"height": 64, "width": 64}
    edit(copy / "preprocessor_config.json", lambda d: d.update(crop_size=side))
    assert "pictures are cropped to 64, but the image tower takes 32" in refused(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 32, "width": 32}},
        {"resample": 5},
        {"image_mean": None},
        {"image_std": [1, 1]},
        {"do_normalize": False},
    ],
    ids=str,
)
def test_a_processor_that_we_have_not(copy, change):
    edit(copy / "preprocessor_config.json", lambda d: d.update(change))
    message = refused(copy)
    assert "preprocessor_config.json" in message
    assert "expected a CLIPImageProcessor" in message


def test_a_tokenizer_of_another_vocabulary(copy):
    byte_tokenizer(514).save(str(copy / "tokenizer.json"))
    message = refused(copy)
    assert "the tokenizer's <|endoftext|> is 513" in message
    assert "the text tower pools at 49407" in message


def test_a_tokenizer_that_is_none(copy):
    (copy / "tokenizer.json").write_text("{}")
    assert f"{copy / 'tokenizer.json'}: not a readable tokenizer" in refused(copy)


# ------------------------------------------------------------------------------ OpenAI's files


@pytest.fixture(scope="module", params=["vit", "resnet"])
def openai(request):
    """A model of OpenAI's, tiny, and what it makes of our inputs."""
    model = openai_clip(request.param)
    pixels = some_pixels(3, model.visual.input_resolution)
    with torch.inference_mode():
        images = unit(model.encode_image(normalised(pixels)))
        return model, (images, unit(model.encode_text(torch.from_numpy(IDS))))


def save_torchscript(model: torch.nn.Module, path: Path) -> None:
    """As OpenAI's files are: a traced module that carries its sizes as buffers."""
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


def test_openai_torchscript_archive(tmp_path, vocabulary):
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


def test_openai_state_dict(openai, tmp_path, vocabulary):
    model, wanted = openai
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    checkpoint = load_checkpoint(
        str(tmp_path / "mine.pt"), vocabulary=vocabulary, activation="quick_gelu"
    )
    assert_same(checkpoint, wanted)
    assert checkpoint.image.size == checkpoint.image.resize == model.visual.input_resolution


def test_wrapped_state_dict(openai, tmp_path, vocabulary):
    """What training loops save: under a key, each name prefixed by DataParallel."""
    model, wanted = openai
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    name = str(tmp_path / "epoch_3.pt")
    assert_same(load_checkpoint(name, vocabulary=vocabulary, activation="quick_gelu"), wanted)


def test_bare_weights_do_not_say_their_activation(openai, tmp_path, vocabulary):
    torch.save(openai[0].state_dict(), tmp_path / "mine.pt")
    message = refused(tmp_path / "mine.pt", vocabulary=vocabulary)
    assert "weights do not say which activation" in message
    assert "--activation quick_gelu" in message


def test_bare_weights_without_a_vocabulary_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    torch.save(openai_clip("vit").state_dict(), tmp_path / "mine.pt")
    message = refused(tmp_path / "mine.pt", activation="gelu")
    assert "the checkpoint brings no tokenizer" in message
    assert "--vocabulary FILE" in message


def test_a_file_named_like_openais_with_other_contents(tmp_path, vocabulary):
    torch.save(openai_clip("vit").state_dict(), tmp_path / "ViT-B-32.pt")
    message = refused(tmp_path / "ViT-B-32.pt", vocabulary=vocabulary, activation="quick_gelu")
    assert "is named like OpenAI's ViT-B/32" in message
    assert "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af" in message
    assert hashlib.sha256((tmp_path / "ViT-B-32.pt").read_bytes()).hexdigest() in message


def publish(monkeypatch, tmp_path: Path, *, contents: bytes | None = None) -> Path:
    """Make a tiny "ViT-T/8" a known model, and put its file into the cache."""
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


def test_a_known_name_from_the_cache(tmp_path, monkeypatch, vocabulary):
    cached = publish(monkeypatch, tmp_path)
    checkpoint = load_checkpoint("ViT-T/8", vocabulary=vocabulary)
    assert checkpoint.clip.config.text.activation == "quick_gelu"
    assert (checkpoint.name, checkpoint.source) == ("ViT-T-8", "ViT-T/8")
    # The same file by its path is recognised by its contents.
    assert load_checkpoint(str(cached), vocabulary=vocabulary).weights_sha256 == (
        checkpoint.weights_sha256
    )


def test_a_known_name_with_a_damaged_file_in_the_cache(tmp_path, monkeypatch, vocabulary):
    cached = publish(monkeypatch, tmp_path, contents=b"half of it")
    message = refused("ViT-T/8", vocabulary=vocabulary)
    assert f"{cached} has sha256 {hashlib.sha256(b'half of it').hexdigest()}" in message
    assert "delete it and try again" in message


def test_a_known_name_offline_and_not_in_the_cache(tmp_path, monkeypatch, vocabulary):
    publish(monkeypatch, tmp_path).unlink()
    message = refused("ViT-T/8", vocabulary=vocabulary)
    assert "https://example.invalid/" in message
    assert "HF_HUB_OFFLINE is set; put the file at" in message


class Attack:
    """Unpickled the ordinary way, this runs code of the file's author."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "plain"])
def test_a_pickle_that_needs_code_is_refused_and_does_not_run(form, tmp_path, vocabulary):
    path, marker = tmp_path / "trap.pt", tmp_path / "ran"
    content = {"state_dict": {"logit_scale": torch.ones(())}, "extra": Attack(marker)}
    if form == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    message = refused(path, vocabulary=vocabulary, activation="gelu")
    assert f"{path}: refused: " in message
    assert "weights_only=True" in message
    assert "convert it to safetensors" in message
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
def test_a_text_file_as_weights(suffix, tmp_path, vocabulary):
    path = (tmp_path / "weights").with_suffix(suffix)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    message = refused(path, vocabulary=vocabulary, activation="gelu")
    assert f"{path}: not a PyTorch file (neither a zip archive nor a pickle)" in message


def test_an_empty_file_as_weights(tmp_path, vocabulary):
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).touch()
        assert str(tmp_path / name) in refused(
            tmp_path / name, vocabulary=vocabulary, activation="gelu"
        )


def test_a_damaged_torchscript_archive(tmp_path, vocabulary):
    import zipfile

    path = tmp_path / "broken.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("broken/constants.pkl", b"\x80\x02).")
    message = refused(path, vocabulary=vocabulary, activation="gelu")
    assert str(path) in message
    assert "TorchScript" in message


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"state_dict": None}], ids=str)
def test_a_pickle_of_something_else(content, tmp_path, vocabulary):
    torch.save(content, tmp_path / "other.pt")
    message = refused(tmp_path / "other.pt", vocabulary=vocabulary, activation="gelu")
    assert "expected a dictionary of tensors (a state dict)" in message


def test_tensors_of_something_else(tmp_path, vocabulary):
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    message = refused(tmp_path / "other.safetensors", vocabulary=vocabulary, activation="gelu")
    assert "not" in message
    assert "CLIP" in message


# ---------------------------------------------------------------------------------- OpenCLIP


def open_clip_document(model: torch.nn.Module, **vision) -> dict:
    """As OpenCLIP's `push_to_hf_hub` writes it."""
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
def test_open_clip_directory(openai, prefix, tmp_path, vocabulary):
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
    # Mean and std of the file are those the tower applies.
    pixels = some_pixels(3, checkpoint.image.size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    with torch.inference_mode():
        images = unit(model.encode_image((torch.from_numpy(pixels) / 255 - mean) / std))
    np.testing.assert_allclose(embeddings(checkpoint)[0], images, atol=1e-5)


def test_open_clip_weights_given_as_a_file(tmp_path, vocabulary):
    model = openai_clip("vit")
    save_open_clip(tmp_path / "open", model, open_clip_document(model))
    shutil.copy(vocabulary, tmp_path)
    checkpoint = load_checkpoint(
        str(tmp_path / "open" / "open_clip_model.safetensors"), vocabulary=vocabulary
    )
    assert checkpoint.clip.config.image.activation == "quick_gelu"
    assert checkpoint.image.interpolation == "bilinear"


def test_open_clip_activation_and_head_width_come_from_the_file(tmp_path, vocabulary):
    model = openai_clip("vit")
    document = open_clip_document(model, head_width=32)
    del document["model_cfg"]["quick_gelu"]  # OpenCLIP's default is GELU
    save_open_clip(tmp_path / "open", model, document)
    config = load_checkpoint(str(tmp_path / "open"), vocabulary=vocabulary).clip.config
    assert config.image.activation == config.text.activation == "gelu"
    assert config.image.heads == 4


def test_open_clip_tower_of_timm(tmp_path, vocabulary):
    model = openai_clip("vit")
    document = open_clip_document(model, timm_model_name="vit_base_patch16_siglip_224")
    save_open_clip(tmp_path / "open", model, document)
    message = refused(tmp_path / "open", vocabulary=vocabulary)
    assert "open_clip_config.json: vision_cfg has timm_model_name" in message
    assert "only ViT and ModifiedResNet towers" in message


def test_open_clip_resize_mode_that_we_have_not(tmp_path, vocabulary):
    model = openai_clip("vit")
    document = open_clip_document(model)
    document["preprocess_cfg"]["resize_mode"] = "squash"
    save_open_clip(tmp_path / "open", model, document)
    message = refused(tmp_path / "open", vocabulary=vocabulary)
    assert "resize_mode 'squash'; expected 'shortest'" in message


def test_open_clip_without_weights(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert "half a checkpoint: open_clip_model.safetensors is not there" in refused(tmp_path)


# --------------------------------------------------------------------------------------- hub


def test_hub_id_from_the_local_cache(tiny_checkpoint, tmp_path, monkeypatch, expected):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--their-clip", "c" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_checkpoint, repository / "snapshots" / commit)
    checkpoint = load_checkpoint("someone/their-clip")
    assert_same(checkpoint, expected)
    assert (checkpoint.name, checkpoint.source) == ("their-clip", "someone/their-clip")


def test_hub_id_offline_and_not_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("openai/clip-vit-base-patch32")
    assert "'openai/clip-vit-base-patch32' could not be fetched from the Hugging Face hub" in (
        message
    )
    assert "give a local directory" in message


def test_hub_repository_without_weights(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--empty"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    snapshot = repository / "snapshots" / ("c" * 40)
    shutil.copytree(tiny_checkpoint, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    message = refused("someone/empty")
    assert "someone/empty holds no weights" in message
    assert "model*.safetensors" in message


# ------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "close"), [("ViT-B-33", "ViT-B/32"), ("RN51", "RN50"), ("random-ViT-L-14", "random:")]
)
def test_an_unknown_name_suggests_others(name, close):
    message = refused(name)
    assert f"unknown checkpoint {name!r}" in message
    assert "did you mean" in message
    assert close in message
    assert "`python -m export list`" in message


def test_an_unknown_name_with_a_slash_suggests_others(tmp_path, monkeypatch):
    """It looks like a hub id, so it is looked up; the likely mistake is still told."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("ViT-B/33")
    assert "could not be fetched" in message
    assert "did you mean ViT-B/32" in message


def test_an_unknown_name_like_nothing():
    message = refused("/no/such/path.pt")
    assert "unknown checkpoint '/no/such/path.pt'" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("name", ["random:ViT-B-33", "random:", "random:RN50@x", "random:RN50@-1"])
def test_an_unknown_random_architecture(name):
    message = refused(name)
    assert repr(name) in message
    assert "ViT-B-32" in message
    assert "RN50x64" in message


# ----------------------------------------------------------------------------------- random


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


def test_random_weights_with_a_real_vocabulary(monkeypatch, tiny_checkpoint, vocabulary):
    config = load_checkpoint(str(tiny_checkpoint)).clip.config
    monkeypatch.setitem(ARCHITECTURES, "ViT-T-8", config)
    checkpoint = load_checkpoint("random:ViT-T-8", vocabulary=vocabulary)
    assert checkpoint.tokenizer.encode("a cat").ids == [49406, 320, 2368, 49407]


@pytest.mark.parametrize(
    ("name", "millions"),
    # Radford et al. do not print totals; these are those of the published files.
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


# ----------------------------------------------------------------------------------- saving


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
def test_openais_layout_written_is_openais_layout_read(kind, tmp_path, vocabulary):
    state = openai_clip(kind).state_dict()
    torch.save(state, tmp_path / "mine.pt")
    checkpoint = load_checkpoint(
        str(tmp_path / "mine.pt"), vocabulary=vocabulary, activation="quick_gelu"
    )
    written = to_layout(checkpoint.clip, "openai")
    assert written.keys() == {n for n in state if not n.endswith("num_batches_tracked")}
    for name, tensor in written.items():
        assert torch.equal(tensor, state[name]), name
