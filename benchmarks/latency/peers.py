"""What people run without this project, on the same weights: transformers, and a plain export.

transformers' `CLIPModel` takes the float pictures of its own processor and the ids of its own
tokenizer, padded to 77 as its documentation pads them. The plain export is `torch.onnx.export` of
that model's towers, float in and full length, run by ONNX Runtime with its own optimisations and
the same number of threads: what an exporter makes that knows nothing of CLIP.

Does not know: what is timed (`candidates.py`, `test_stages.py`).
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
    """transformers' model of a checkpoint that was saved in `folder`, its processor and tokenizer.

    Raises:
        MissingPackageError: transformers is not installed.
    """

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all it needs is there
        require("the peer transformers", "bench", "transformers")
        import transformers

        logging: Any = transformers.utils.logging
        logging.disable_progress_bar()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        model: Any = transformers.CLIPModel.from_pretrained(folder)
        self.model = model.eval()
        # The processor without torchvision, which is not needed for anything else.
        self._processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
        self._tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        text = self.model.config.text_config
        self.context_length: int = text.max_position_embeddings
        self.end_id: int = text.eos_token_id

    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Its processor: float32 [n, 3, size, size]."""
        pixels: torch.Tensor = self._processor(list(pictures), return_tensors="pt").pixel_values
        return pixels

    def texts(self, texts: Sequence[str], padding: Padding) -> dict[str, torch.Tensor]:
        """Its tokenizer: `input_ids` and `attention_mask`, int64 [n, length]."""
        ids = self._tokenizer(
            list(texts),
            padding=padding,
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        return dict(ids)

    def embed(self, tower: Tower, inputs: Any) -> NDArray[np.float32]:
        """Unit vectors, as its documentation makes them: float32 [n, dim]."""
        torch.set_num_threads(cpu_count())
        with torch.inference_mode():
            if tower == "image":
                found = self.model.get_image_features(pixel_values=inputs)
            else:
                found = self.model.get_text_features(**inputs)
            features = found if isinstance(found, torch.Tensor) else found.pooler_output
            unit: NDArray[np.float32] = nn.functional.normalize(features, dim=-1).numpy()
        return unit


def normalised(pixels: Batch, spec: ImageSpec) -> torch.Tensor:
    """uint8 [n, 3, size, size] -> what a CLIP without scaling inside takes, float32."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


class PeerRunner(LoadedRunner):
    """A tower that takes inputs prepared outside: a peer is not charged for preparing them."""

    runtime: ClassVar[str]

    def __init__(self, peer: Peer, tower: Tower) -> None:
        self.spec, self.runtime_version = RunnerSpec(self.runtime, "fp32"), peer.version
        self._peer, self._tower = peer, tower

    @abstractmethod
    def prepared(self, batch: Batch, spec: ImageSpec) -> Any:
        """What `run` takes for our batch `pixels` or `input_ids`."""


class TransformersRunner(PeerRunner):
    """`CLIPModel.get_image_features` or `get_text_features`, eager, with its default attention."""

    runtime = "transformers"

    def prepared(self, batch: Batch, spec: ImageSpec) -> Any:
        """Floats, or ids and the mask that its tokenizer gives."""
        if self._tower == "image":
            return normalised(batch, spec)
        ids = torch.from_numpy(batch).long()
        ends = (ids == self._peer.end_id).long().argmax(dim=1, keepdim=True)
        mask = (torch.arange(ids.shape[1]) <= ends).long()
        return {"input_ids": ids, "attention_mask": mask}

    def _load(self) -> Any:
        return self._peer

    def _infer(self, batch: Any) -> Embeddings:
        return self._peer.embed(self._tower, batch)


class PlainOnnxRunner(PeerRunner):
    """A plain export of transformers' tower, by ONNX Runtime on the CPU."""

    runtime = "onnxruntime-plain"

    def __init__(self, peer: Peer, tower: Tower, folder: Path) -> None:
        super().__init__(peer, tower)
        self.runtime_version = f"onnxruntime {onnxruntime.__version__}, graph of {peer.version}"
        self._path = folder / f"{tower}.plain.onnx"

    def prepared(self, batch: Batch, spec: ImageSpec) -> Any:
        """Floats, or ids int64."""
        pixels = normalised(batch, spec).numpy() if self._tower == "image" else None
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
    """What is exported: one input, one output."""

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
        warnings.simplefilter("ignore")  # the tracing exporter is deprecated, and widely used
        torch.onnx.export(
            _Tower(peer.model, tower).eval(),
            (example,),
            path,
            dynamo=False,
            input_names=["batch"],
            dynamic_axes={"batch": {0: "batch"}},
            opset_version=17,
        )
