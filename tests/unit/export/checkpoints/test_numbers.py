"""Numbers of configurations and weights that no trained model has, in every layout."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.load import load_checkpoint
from export.checkpoints.vocabulary import openai_tokenizer
from serving.errors import CheckpointError
from tests.support.references import openai_clip

NOT_FINITE = [math.nan, math.inf, -math.inf]


def linked(source: Path, target: Path) -> Path:
    """A copy of a directory whose weights are links, which `change_weights` replaces."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in source.glob("*.safetensors"):
        (target / file.name).hardlink_to(file)
    return target


@pytest.fixture
def copy(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that tests may damage."""
    return linked(tiny_checkpoint, tmp_path / "spoiled")


@pytest.fixture
def open_clip(sound_open_clip, tmp_path) -> Path:
    """An OpenCLIP directory that tests may damage."""
    return linked(sound_open_clip, tmp_path / "spoiled")


@pytest.fixture(scope="module")
def sound_open_clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("open_clip") / "open"
    path.mkdir()
    save_file(openai_clip("vit").state_dict(), path / "open_clip_model.safetensors")
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    model = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": {"image_size": 32}}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    document = {"model_cfg": model | {"text_cfg": text}, "preprocess_cfg": preprocess}
    (path / "open_clip_config.json").write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary, tmp_path_factory) -> Path:
    """OpenAI's tokenizer as a tokenizer.json, which loads faster than the vocabulary."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    openai_tokenizer(vocabulary).save(str(path))
    return path


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def change_weights(file: Path, change) -> None:
    state = (
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    )
    change(state)
    file.unlink()
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)


def error_of(path, **options) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(path), **options)
    return caught.value


# ------------------------------------------------------------------------------------ weights

WEIGHTS = {
    "hugging_face": ("model.safetensors", "text_model.encoder.layers.1.mlp.fc1.weight"),
    "openai": ("mine.pt", "transformer.resblocks.1.mlp.c_fc.weight"),
    "wrapped": ("mine.pt", "module.transformer.resblocks.1.mlp.c_fc.weight"),
    "open_clip": ("open_clip_model.safetensors", "visual.transformer.resblocks.0.ln_1.bias"),
}


@pytest.fixture(params=list(WEIGHTS))
def checkpoint_file(request, tmp_path, tokenizer):
    """A weights file, the name of a tensor in it, and the arguments of `load_checkpoint`."""
    file, name = WEIGHTS[request.param]
    if request.param == "hugging_face":
        path = request.getfixturevalue("copy")
        return path / file, name, (path, {})
    if request.param == "open_clip":
        path = request.getfixturevalue("open_clip")
        return path / file, name, (path, {"vocabulary": tokenizer})
    prefix = "module." if request.param == "wrapped" else ""
    state = {prefix + key: tensor for key, tensor in openai_clip("vit").state_dict().items()}
    torch.save(state, tmp_path / file)
    options = {"vocabulary": tokenizer, "activation": "quick_gelu"}
    return tmp_path / file, name, (tmp_path / file, options)


@pytest.mark.parametrize(
    ("value", "dtype"),
    list(zip(NOT_FINITE, (torch.float32, torch.float16, torch.bfloat16), strict=True)),
)
def test_weight_that_is_not_finite_is_named(checkpoint_file, value, dtype):
    file, name, (path, options) = checkpoint_file

    def spoil(state):
        for other in state:
            state[other] = state[other].to(dtype).contiguous()
        flat = state[name].view(-1)
        flat[3], flat[5] = value, value

    change_weights(file, spoil)
    error = error_of(path, **options)
    assert error.name == f"{file}, weight {name}"
    assert "2 of its" in error.reason.lower()
    assert f"is {value:g} at [" in error.reason.lower()


def test_weight_of_a_shard_is_named_with_its_file(copy):
    state = load_file(copy / "model.safetensors")
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    state[parts["model-2.safetensors"][0]].view(-1)[0] = math.nan
    for file, some in parts.items():
        save_file({name: state[name] for name in some}, copy / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    expected = f"{copy / 'model-2.safetensors'}, weight {parts['model-2.safetensors'][0]}"
    assert error_of(copy).name == expected


def test_weight_beyond_float32_is_named(copy):
    def spoil(state):
        state["logit_scale"] = torch.tensor(1e300, dtype=torch.float64)

    change_weights(copy / "model.safetensors", spoil)
    error = error_of(copy)
    assert error.name.endswith("weight logit_scale")
    assert "1e+300" in error.reason.lower()


def test_attention_mask_of_infinities_is_not_a_weight(open_clip, tokenizer):
    def add(state):
        state["attn_mask"] = torch.full((77, 77), -math.inf).triu(1)

    change_weights(open_clip / "open_clip_model.safetensors", add)
    load_checkpoint(str(open_clip), vocabulary=tokenizer)


@pytest.mark.parametrize("value", [100.0, -104.0])
def test_logit_scale_beyond_float32_is_refused(checkpoint_file, value):
    """Checkpoints hold the logarithm; 100 is a scale that was stored without it."""
    file, name, (path, options) = checkpoint_file
    prefix = "module." if name.startswith("module.") else ""

    def spoil(state):
        state[f"{prefix}logit_scale"] = torch.tensor(value)

    change_weights(file, spoil)
    error = error_of(path, **options)
    assert error.name == "weight logit_scale"
    assert f"e^{value:g}" in error.reason.lower()


def test_largest_logit_scales_are_loaded(copy):
    for value in (88.7, -80.0):
        change_weights(
            copy / "model.safetensors", lambda s, v=value: s.update(logit_scale=torch.tensor(v))
        )
        assert load_checkpoint(str(copy)).clip.logit_scale.exp().isfinite()


def test_quantized_weight_is_refused(copy):
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    change_weights(copy / "model.safetensors", lambda s: s.update({name: s[name].to(torch.int8)}))
    assert error_of(copy).name == f"weight {name}"


def test_negative_variance_of_a_batch_norm_is_refused(tmp_path, tokenizer):
    state, name = openai_clip("resnet").state_dict(), "visual.bn1.running_var"
    state[name][0] = -0.5
    torch.save(state, tmp_path / "mine.pt")
    options = {"vocabulary": tokenizer, "activation": "quick_gelu"}
    assert error_of(tmp_path / "mine.pt", **options).name == f"weight {name}"


# ----------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("layer_norm_eps", value) for value in (math.nan, math.inf, 0, -1e-5, 2, "1e-5", None)),
        *(("hidden_size", value) for value in (math.nan, 0, 64.5, 10**9, "wide")),
        *(("num_hidden_layers", value) for value in (0, -1, 1.5, 10**6)),
        ("num_attention_heads", 0),
        ("intermediate_size", -256),
    ],
    ids=str,
)
def test_number_out_of_range_in_the_configuration_is_refused(copy, section, key, value):
    edit(copy / "config.json", lambda d: d[section].update({key: value}))
    error = error_of(copy)
    assert "config.json" in f"{error.name} {error.reason}".lower()


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("vision_config", "patch_size"),
        ("vision_config", "image_size"),
        ("text_config", "vocab_size"),
    ],
)
@pytest.mark.parametrize("value", [0, 10**12, [32]])
def test_size_of_one_tower_out_of_range_is_refused(copy, section, key, value):
    edit(copy / "config.json", lambda d: d[section].update({key: value}))
    error = error_of(copy)
    assert "config.json" in f"{error.name} {error.reason}".lower()


def test_sizes_too_large_for_memory_are_compared_with_the_weights_first(copy):
    """Towers of these sizes would take terabytes."""

    def enlarge(document):
        for section in ("text_config", "vision_config"):
            document[section].update(hidden_size=1 << 20, intermediate_size=1 << 22)

    edit(copy / "config.json", enlarge)
    assert "shape" in error_of(copy).reason.lower()


PREPROCESSING = [
    *(("mean", value) for value in (*NOT_FINITE, -0.1, 123.675, "0.5")),
    *(("std", value) for value in (*NOT_FINITE, 0, -0.2, 1e-6, 58.4, "0.5")),
]


@pytest.mark.parametrize(("key", "value"), PREPROCESSING, ids=str)
def test_impossible_normalization_is_refused_in_a_hugging_face_directory(copy, key, value):
    file = copy / "preprocessor_config.json"
    edit(file, lambda d: d.update({f"image_{key}": [0.5, value, 0.5]}))
    error = error_of(copy)
    assert str(file).lower() in error.reason.lower()
    assert f"image_{key}" in error.reason.lower()


@pytest.mark.parametrize(("key", "value"), PREPROCESSING, ids=str)
def test_impossible_normalization_is_refused_in_an_open_clip_directory(
    open_clip, key, value, tokenizer
):
    values = [0.5, value, 0.5]
    edit(open_clip / "open_clip_config.json", lambda d: d["preprocess_cfg"].update({key: values}))
    error = error_of(open_clip, vocabulary=tokenizer)
    assert "open_clip_config.json" in f"{error.name} {error.reason}".lower()
    assert key in f"{error.name} {error.reason}".lower()


@pytest.mark.parametrize(
    "change",
    [
        *({"rescale_factor": value} for value in (*NOT_FINITE, 0, -1 / 255, 1, "1/255", None)),
        *({"size": {"shortest_edge": value}} for value in (0, 31, 32.5, math.inf, 10**12)),
        {"crop_size": {"height": 32, "width": 64}},
        {"crop_size": {"height": math.nan, "width": 32}},
        {"crop_size": -32},
    ],
    ids=str,
)
def test_number_out_of_range_in_the_preprocessing_is_refused(copy, change):
    edit(copy / "preprocessor_config.json", lambda d: d.update(change))
    assert "preprocessor_config.json" in error_of(copy).reason.lower()


@pytest.mark.parametrize(("section", "key"), [("vision_cfg", "head_width"), ("text_cfg", "heads")])
@pytest.mark.parametrize("value", [0, 1.5, "eight", math.nan, 10**12])
def test_number_of_heads_out_of_range_is_refused(open_clip, tokenizer, section, key, value):
    edit(
        open_clip / "open_clip_config.json", lambda d: d["model_cfg"][section].update({key: value})
    )
    error = error_of(open_clip, vocabulary=tokenizer)
    assert "open_clip_config.json" in f"{error.name} {error.reason}".lower()


def test_weights_of_another_rank_are_refused(tmp_path, tokenizer):
    state = openai_clip("vit").state_dict()
    state["visual.conv1.weight"] = state["visual.conv1.weight"].flatten()
    torch.save(state, tmp_path / "mine.pt")
    error = error_of(tmp_path / "mine.pt", vocabulary=tokenizer, activation="quick_gelu")
    assert "dimensions" in error.reason.lower()


def test_seed_beyond_int32_is_refused():
    assert "seed" in error_of(f"random:ViT-B-32@{10**30}").reason.lower()
