"""Peers: alternatives to this project on the same weights, transformers and a plain ONNX export.

transformers' `CLIPModel` receives float images from its own processor and token ids from its own
tokenizer, padded to 77 tokens as in its documentation. The plain export is `torch.onnx.export` of
the towers of that model, with float images and full-length texts. ONNX Runtime runs it with its
default optimizations and the same number of threads. It represents an exporter without knowledge of
CLIP.

`candidates.py` and `test_stages.py` define what is measured.
"""

import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from export.checkpoints.load import Checkpoint
from export.checkpoints.weight_names import save_checkpoint
from serving.bundles.manifest import ImageSpec, Tower
from serving.runners.base import Batch, Embeddings, LoadedRunner
from serving.runners.spec import RunnerSpec
from serving.util.extras import require
from serving.util.machine import cpu_count

Padding = Literal["max_length", "longest"]


def save_for_peers(checkpoint: Checkpoint, directory: Path) -> None:
    """Write `checkpoint` in the layout that transformers loads."""
    save_checkpoint(directory, checkpoint.clip, checkpoint.image, checkpoint.tokenizer)


class Peer:
    """transformers' model, processor and tokenizer of a checkpoint saved in `directory`.

    Raises:
        MissingPackageError: transformers is not installed.
    """

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # `directory` has all files
        require("the peer transformers", "bench", "transformers")
        import transformers

        logging: Any = transformers.utils.logging
        logging.disable_progress_bar()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        model: Any = transformers.CLIPModel.from_pretrained(directory)
        self.model = model.eval()
        # This processor does not need torchvision, which is not a dependency.
        self._processor = transformers.CLIPImageProcessorPil.from_pretrained(directory)
        self._tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
        text = self.model.config.text_config
        self.context_length: int = text.max_position_embeddings
        self.end_id: int = text.eos_token_id

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Preprocess images with its processor: float32 [n, 3, size, size]."""
        pixels: torch.Tensor = self._processor(list(images), return_tensors="pt").pixel_values
        return pixels

    def texts(self, texts: Sequence[str], padding: Padding) -> dict[str, torch.Tensor]:
        """Tokenize texts with its tokenizer: `input_ids`, `attention_mask`, int64 [n, length]."""
        ids = self._tokenizer(
            list(texts),
            padding=padding,
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        return dict(ids)

    def embed(self, tower: Tower, inputs: Any) -> NDArray[np.float32]:
        """Return unit-length embeddings, as in its documentation: float32 [n, dim]."""
        torch.set_num_threads(cpu_count())
        with torch.inference_mode():
            if tower == "image":
                found = self.model.get_image_features(pixel_values=inputs)
            else:
                found = self.model.get_text_features(**inputs)
            features = found if isinstance(found, torch.Tensor) else found.pooler_output
            unit: NDArray[np.float32] = nn.functional.normalize(features, dim=-1).numpy()
        return unit


def normalized(pixels: Batch, spec: ImageSpec) -> torch.Tensor:
    """Scale and normalize pixels uint8 [n, 3, size, size] to float32 for `CLIPModel`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


class PeerRunner(LoadedRunner):
    """Tower of a peer. Its inputs are prepared outside of `run`, so that this is not timed."""

    runtime: ClassVar[str]

    def __init__(self, peer: Peer, tower: Tower) -> None:
        self.spec, self.runtime_version = RunnerSpec(self.runtime, "fp32"), peer.version
        self._peer, self._tower = peer, tower

    @abstractmethod
    def prepared(self, batch: Batch, spec: ImageSpec) -> Any:
        """Return the input of `run` for a batch of `pixels` or `input_ids`."""


class TransformersRunner(PeerRunner):
    """`CLIPModel.get_image_features` or `get_text_features`, eager, with its default attention."""

    runtime = "transformers"

    def prepared(self, batch: Batch, spec: ImageSpec) -> Any:
        """Return float images, or token ids with the attention mask of its tokenizer."""
        if self._tower == "image":
            return normalized(batch, spec)
        ids = torch.from_numpy(batch).long()
        ends = (ids == self._peer.end_id).long().argmax(dim=1, keepdim=True)
        mask = (torch.arange(ids.shape[1]) <= ends).long()
        return {"input_ids": ids, "attention_mask": mask}

    def _load(self) -> Any:
        return self._peer

    def _infer(self, batch: Any) -> Embeddings:
        return self._peer.embed(self._tower, batch)


class PlainOnnxRunner(PeerRunner):
    """Plain ONNX export of a transformers tower, run by ONNX Runtime on the CPU."""

    runtime = "onnxruntime-plain"

    def __init__(self, peer: Peer, tower: Tower, directory: Path) -> None:
        super().__init__(peer, tower)
        self.runtime_version = f"onnxruntime {onnxruntime.__version__}, graph of {peer.version}"
        self._path = directory / f"{tower}.plain.onnx"

    def prepared(self, batch: Batch, spec: ImageSpec) -> Any:
        """Return float images, or token ids as int64."""
        pixels = normalized(batch, spec).numpy() if self._tower == "image" else None
        return batch.astype(np.int64) if pixels is None else pixels

    def _load(self) -> Any:
        if not self._path.exists():
            _export_plainly(self._peer, self._tower, self._path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpu_count()
        return onnxruntime.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])

    def _infer(self, batch: Any) -> Embeddings:
        output: Embeddings = self._loaded.run(None, {self._loaded.get_inputs()[0].name: batch})[0]
        return output


class _Tower(nn.Module):
    """Module to export, with one input and one output."""

    def __init__(self, model: Any, tower: Tower) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if self.tower == "image":
            found = self.model.get_image_features(pixel_values=batch)
        else:
            found = self.model.get_text_features(input_ids=batch)
        features = found if isinstance(found, torch.Tensor) else found.pooler_output
        return nn.functional.normalize(features, dim=-1)


def _export_plainly(peer: Peer, tower: Tower, path: Path) -> None:
    size = peer.model.config.vision_config.image_size
    example = (
        torch.zeros(2, 3, size, size)
        if tower == "image"
        else torch.zeros(2, peer.context_length).long()
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracing exporter is deprecated, but widely used
        torch.onnx.export(
            _Tower(peer.model, tower).eval(),
            (example,),
            path,
            dynamo=False,
            input_names=["batch"],
            dynamic_axes={"batch": {0: "batch"}},
            opset_version=17,
        )
