"""Registry of named architectures and of published checkpoints.

Sizes are from OpenAI (Radford et al. 2021, tables 19 and 20) and from OpenCLIP's
`model_configs/*.json`.
"""

from dataclasses import dataclass

from export.towers.clip import (
    Activation,
    ClipConfig,
    ResNetConfig,
    TextConfig,
    VisionTransformerConfig,
)

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def _text(width: int, heads: int, layers: int = 12, act: Activation = "quick_gelu") -> TextConfig:
    return TextConfig(
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=4 * width,
        activation=act,
        context_length=77,
        vocab_size=49408,
        end_id=49407,
    )


def _vit(
    size: int,
    patch: int,
    width: int,
    layers: int,
    heads: int,
    *,
    mlp_width: int | None = None,
    act: Activation = "quick_gelu",
) -> VisionTransformerConfig:
    return VisionTransformerConfig(
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=mlp_width or 4 * width,
        activation=act,
        image_size=size,
        patch_size=patch,
    )


def _resnet(size: int, width: int, layers: tuple[int, int, int, int]) -> ResNetConfig:
    return ResNetConfig(image_size=size, width=width, layers=layers, heads=width // 2)


def _clip(dim: int, image: VisionTransformerConfig | ResNetConfig, text: TextConfig) -> ClipConfig:
    return ClipConfig(embed_dim=dim, image=image, text=text)


ARCHITECTURES: dict[str, ClipConfig] = {
    "RN50": _clip(1024, _resnet(224, 64, (3, 4, 6, 3)), _text(512, 8)),
    "RN101": _clip(512, _resnet(224, 64, (3, 4, 23, 3)), _text(512, 8)),
    "RN50x4": _clip(640, _resnet(288, 80, (4, 6, 10, 6)), _text(640, 10)),
    "RN50x16": _clip(768, _resnet(384, 96, (6, 8, 18, 8)), _text(768, 12)),
    "RN50x64": _clip(1024, _resnet(448, 128, (3, 15, 36, 10)), _text(1024, 16)),
    "ViT-B-32": _clip(512, _vit(224, 32, 768, 12, 12), _text(512, 8)),
    "ViT-B-16": _clip(512, _vit(224, 16, 768, 12, 12), _text(512, 8)),
    "ViT-L-14": _clip(768, _vit(224, 14, 1024, 24, 16), _text(768, 12)),
    "ViT-L-14-336": _clip(768, _vit(336, 14, 1024, 24, 16), _text(768, 12)),
    "ViT-H-14": _clip(
        1024, _vit(224, 14, 1280, 32, 16, act="gelu"), _text(1024, 16, 24, act="gelu")
    ),
    "ViT-g-14": _clip(
        1024,
        _vit(224, 14, 1408, 40, 16, mlp_width=6144, act="gelu"),
        _text(1024, 16, 24, act="gelu"),
    ),
    "ViT-bigG-14": _clip(
        1280,
        _vit(224, 14, 1664, 48, 16, mlp_width=8192, act="gelu"),
        _text(1280, 20, 32, act="gelu"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """Published checkpoint: its name, its architecture, and the source of its weights."""

    name: str
    architecture: str
    source: str
    """The https URL of a file, or a Hugging Face hub id."""
    sha256: str | None = None
    """sha256 of the file at the URL, as stated by its publisher."""
    tokenizer_repo: str = "openai/clip-vit-base-patch32"
    """Hub repository with the tokenizer, for weights files without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCheckpoints:
    """Document printed by `clip-deploy list --json`."""

    models: tuple[KnownModel, ...]
    architectures: dict[str, ClipConfig]
    """Architectures by the name used in `KnownModel.architecture` and `random:NAME`."""


def _openai(name: str, architecture: str, sha256: str) -> KnownModel:
    file = name.replace("/", "-").replace("@", "-")
    return KnownModel(
        name=name,
        architecture=architecture,
        source=f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}.pt",
        sha256=sha256,
    )


def _hub(name: str, architecture: str) -> KnownModel:
    return KnownModel(name=name, architecture=architecture, source=name)


# The sha256 sums are from the URLs in openai/CLIP, clip/clip.py, `_MODELS`.
KNOWN_MODELS: tuple[KnownModel, ...] = (
    _openai("RN50", "RN50", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    _openai("RN101", "RN101", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    _openai("RN50x4", "RN50x4", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    _openai(
        "RN50x16", "RN50x16", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"
    ),
    _openai(
        "RN50x64", "RN50x64", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"
    ),
    _openai(
        "ViT-B/32", "ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    ),
    _openai(
        "ViT-B/16", "ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
    ),
    _openai(
        "ViT-L/14", "ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
    ),
    _openai(
        "ViT-L/14@336px",
        "ViT-L-14-336",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    ),
    _hub("openai/clip-vit-base-patch32", "ViT-B-32"),
    _hub("openai/clip-vit-base-patch16", "ViT-B-16"),
    _hub("openai/clip-vit-large-patch14", "ViT-L-14"),
    _hub("openai/clip-vit-large-patch14-336", "ViT-L-14-336"),
    _hub("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "ViT-B-32"),
    _hub("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "ViT-B-16"),
    _hub("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "ViT-L-14"),
    _hub("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "ViT-H-14"),
    _hub("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "ViT-g-14"),
    _hub("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "ViT-bigG-14"),
)
