"""Our towers compared with transformers' `CLIPModel` and OpenAI's own `CLIP`, with the same
weights."""

import copy

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from export.checkpoints.configs import config_from_hugging_face, config_from_openai
from export.checkpoints.weight_names import load_state
from export.towers.clip import Clip
from export.towers.transformer import LayerNorm
from tests.support.references import (
    MEAN,
    STD,
    normalised,
    openai_clip,
    randomise,
    some_ids,
    some_pixels,
    unit,
)

ENDS = [1, 4, 30, 76]


def ours_from(model: CLIPModel) -> Clip:
    clip = Clip(config_from_hugging_face(model.config.to_dict()), MEAN, STD)
    load_state(clip, model.state_dict(), "hugging_face")
    return clip.eval()


def run(tower, batch: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return tower(torch.from_numpy(batch)).numpy()


def transformers_embeddings(model: CLIPModel, pixels, ids) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        out = model(input_ids=torch.from_numpy(ids).long(), pixel_values=normalised(pixels))
    return out.image_embeds.numpy(), out.text_embeds.numpy()


def assert_equal(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    assert got.dtype == np.float32
    assert got.shape == want.shape
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert (got * want).sum(axis=1).min() > 1 - tolerance
    np.testing.assert_allclose(got, want, atol=tolerance)
    # The comparison is meaningful only if different inputs differ by much more than the tolerance.
    spread = np.abs(want[:, None] - want[None]).max(axis=2)[~np.eye(len(want), dtype=bool)]
    assert spread.min() > 100 * tolerance


def tiny_config(**both) -> CLIPConfig:
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    } | both
    return CLIPConfig(
        text_config=sizes | {"vocab_size": 49408},
        vision_config=sizes | {"image_size": 30, "patch_size": 10},
        projection_dim=24,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "quick_gelu"},
        {"hidden_act": "gelu"},
        {"layer_norm_eps": 1e-2},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_towers_equal_transformers(options):
    model = randomise(CLIPModel(tiny_config(**options)), seed=1)
    clip = ours_from(model)
    pixels, ids = some_pixels(4, 30), some_ids(ENDS)
    images, texts = transformers_embeddings(model, pixels, ids)
    assert_equal(run(clip.image, pixels), images, 1e-5)
    assert_equal(run(clip.text, ids), texts, 1e-5)
    assert clip.logit_scale.item() == model.logit_scale.item()


def test_comparison_detects_the_wrong_activation():
    """Without this, the comparison above could pass with the wrong activation."""
    quick = randomise(CLIPModel(tiny_config(hidden_act="quick_gelu")), seed=1)
    exact = CLIPModel(tiny_config(hidden_act="gelu")).eval()
    exact.load_state_dict(quick.state_dict())
    pixels, ids = some_pixels(4, 30), some_ids(ENDS)
    images, texts = transformers_embeddings(exact, pixels, ids)
    assert np.abs(run(ours_from(quick).image, pixels) - images).max() > 1e-3
    assert np.abs(run(ours_from(quick).text, ids) - texts).max() > 1e-3


def test_towers_equal_transformers_at_the_size_of_vit_b_32():
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig()).eval()
    clip = ours_from(model)
    pixels, ids = some_pixels(2, 224), some_ids([3, 76])
    pixels[1] = np.linspace(0, 255, 224, dtype=np.uint8)  # embeddings of noise are nearly equal
    images, texts = transformers_embeddings(model, pixels, ids)
    assert_equal(run(clip.image, pixels), images, 1e-5)
    assert_equal(run(clip.text, ids), texts, 1e-5)


def test_legacy_end_of_text_id_means_the_last_id():
    """Configurations from before 2023 have the id 2. transformers then pools at the highest id."""
    config = tiny_config()
    config.text_config.eos_token_id = 2
    model = randomise(CLIPModel(config), seed=2)
    assert config_from_hugging_face(model.config.to_dict()).text.end_id == 49407
    ids = some_ids(ENDS)
    ids[2, 10] = 2  # an ordinary "#", at which the model must not pool
    _, texts = transformers_embeddings(model, some_pixels(4, 30), ids)
    assert_equal(run(ours_from(model).text, ids), texts, 1e-5)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_towers_equal_openai(kind):
    model = openai_clip(kind)
    clip = Clip(config_from_openai(model.state_dict(), "quick_gelu"), MEAN, STD)
    load_state(clip, model.state_dict(), "openai")
    clip.eval()
    pixels, ids = some_pixels(5, model.visual.input_resolution), some_ids(ENDS, pad=0)
    pixels[1] //= 2
    pixels[2:4, :2] //= 4
    with torch.inference_mode():
        images = unit(model.encode_image(normalised(pixels)))
        texts = unit(model.encode_text(torch.from_numpy(ids)))
    assert_equal(run(clip.image, pixels), images, 1e-5)
    assert_equal(run(clip.text, ids), texts, 1e-5)


@pytest.fixture(scope="module")
def tiny() -> Clip:
    return ours_from(randomise(CLIPModel(tiny_config()), seed=3))


def test_tokens_after_the_end_of_text_are_ignored(tiny):
    zeros, ends, noise = (some_ids(ENDS, pad=pad) for pad in (0, 49407, 1234))
    noise[1, 5:] = np.random.default_rng(1).integers(0, 49408, 72)
    full = run(tiny.text, ends)
    np.testing.assert_allclose(run(tiny.text, zeros), full, atol=1e-6)
    np.testing.assert_allclose(run(tiny.text, noise), full, atol=1e-6)


@pytest.mark.parametrize("length", [5, 8, 16, 48])
def test_truncation_to_a_bucket_is_exact(tiny, length):
    ids = some_ids([1, 2, 4])
    full = run(tiny.text, ids)
    np.testing.assert_allclose(run(tiny.text, ids[:, :length]), full, atol=1e-6)


def test_batch_equals_single_items(tiny):
    pixels, ids = some_pixels(3, 30), some_ids([1, 9, 40])
    for tower, batch in ((tiny.image, pixels), (tiny.text, ids)):
        alone = np.concatenate([run(tower, batch[i : i + 1]) for i in range(3)])
        np.testing.assert_allclose(run(tower, batch), alone, atol=1e-6)


def test_half_precision_weights_stay_near_float32(tiny):
    """LayerNorm and softmax compute in float32, so float16 weights add only rounding errors."""
    half = copy.deepcopy(tiny).half()
    pixels, ids = some_pixels(4, 30), some_ids(ENDS)
    for tower, full, batch in (
        (half.image, tiny.image, pixels),
        (half.text, tiny.text, ids),
    ):
        got = run(tower, batch)
        assert got.dtype == np.float32
        assert (got * run(full, batch)).sum(axis=1).min() > 0.9995


def test_layer_norm_does_not_overflow_in_float16():
    """In float16, the variance of values near 500 would overflow."""
    x = torch.linspace(-900, 900, 64).half()[None]
    norm = LayerNorm(64)
    expected = torch.nn.functional.layer_norm(x.float(), (64,))
    got = norm(x)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, atol=2e-3, rtol=0)


def test_towers_contain_no_infinity(tiny):
    """A float16 graph would keep it, and 0 * infinity is NaN."""
    for name, tensor in [*tiny.named_buffers(), *tiny.named_parameters()]:
        assert torch.isfinite(tensor.half()).all(), name
