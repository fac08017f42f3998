"""Fixtures: checkpoints, and embeddings that other libraries compute from them."""

import pytest
import torch
from transformers import CLIPModel

from tests.support.checkpoints import IDS
from tests.support.references import (
    normalised,
    openai_clip,
    some_pixels,
    unit,
)


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


@pytest.fixture(scope="module", params=["vit", "resnet"])
def openai(request):
    """A tiny model of OpenAI's code, and its embeddings of our inputs."""
    model = openai_clip(request.param)
    pixels = some_pixels(3, model.visual.input_resolution)
    with torch.inference_mode():
        images = unit(model.encode_image(normalised(pixels)))
        return model, (images, unit(model.encode_text(torch.from_numpy(IDS))))
