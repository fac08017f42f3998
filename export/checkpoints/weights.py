"""Reading of weights files without running code from them.

A safetensors file contains only tensors. A pickle is read with `weights_only=True`. A TorchScript
archive, the form of OpenAI's published files, is read by `torch.jit.load`, which runs no Python.
"""

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from export.checkpoints.weight_names import State
from serving.errors import CheckpointError
from serving.util.files import sha256_of
from serving.util.typed_json import parse_json

_NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which trainers save weights beside the state of the training."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "clip.")
"""Prefixes that DistributedDataParallel, torch.compile and Lightning modules add to every name."""
_ADAPTER = re.compile(r"\.lora_[AB]\.|\.base_layer\.")


def read_weights(path: Path) -> tuple[State, str]:
    """Read all tensors of a weights file, or of the shards that an index lists.

    Returns:
        The tensors by name, and the sha256 of the file. For an index, it is the sha256 of the
        shards' concatenated hexadecimal sha256.

    Raises:
        CheckpointError: a file is missing, damaged, or contains anything other than tensors, or a
            weight is not finite.
    """
    try:
        if path.suffix == ".json":
            shards = _shards(path)
            parts = [read_weights(path.parent / os.fspath(shard)) for shard in shards]
            merged = {name: tensor for part, _ in parts for name, tensor in part.items()}
            return merged, hashlib.sha256("".join(sha for _, sha in parts).encode()).hexdigest()
        state = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
        _check_finite(path, state)
        return state, sha256_of(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: a weights file is missing: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error})", advice="download it again"
        ) from error


def _check_finite(path: Path, state: State) -> None:
    """Check that every weight is finite in float32, which the towers compute in.

    Raises:
        CheckpointError: a weight is not; the error has the name of the tensor.
    """
    for name, tensor in state.items():
        # OpenCLIP saves its attention mask, which contains infinities, in some files.
        if not tensor.is_floating_point() or name.rpartition(".")[2] == "attn_mask":
            continue
        bad = ~torch.isfinite(tensor.float())
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            raise CheckpointError(
                f"{int(bad.sum()):,} of its {bad.numel():,} values are not finite in float32, the "
                f"first is {tensor[index].item():g} at {list(index)}; expected finite weights",
                name=f"{path}, weight {name}",
                advice="the checkpoint is damaged, or its training diverged: use another one",
            )


def _read_torch(path: Path) -> State:
    if not zipfile.is_zipfile(path) and path.read_bytes()[:2] != b"\x80\x02":
        raise CheckpointError(
            f"{path}: not a PyTorch file (neither a zip archive nor a pickle); expected "
            ".safetensors, an OpenAI .pt or an OpenCLIP .bin"
        )
    if zipfile.is_zipfile(path) and _is_torchscript(path):
        return _read_torchscript(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path}: not loaded: {str(error).splitlines()[0]}. Only tensors are loaded from a "
            "pickle (weights_only=True), because a pickle can run any code",
            advice="if you trust this file, convert it to safetensors",
        ) from error
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(t, torch.Tensor) for t in content.values()
    ):
        raise CheckpointError(f"{path}: expected a dictionary of tensors (a state dict)")
    return content


def _shards(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise CheckpointError(
            f"{index} has no weight_map; expected an index of sharded weights as written by "
            "transformers"
        )
    return sorted(set(names.values()))


def _read_torchscript(path: Path) -> State:
    try:
        with warnings.catch_warnings():
            # Deprecated, but nothing else reads the archives that OpenAI published.
            warnings.filterwarnings("ignore", ".*torch.jit.load", DeprecationWarning)
            state: State = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: the TorchScript archive cannot be read ({reason})", advice="download it again"
        ) from error
    return state


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def strip_wrappers(state: State) -> dict[str, torch.Tensor]:
    """Remove prefixes that training wrappers and OpenCLIP's CustomTextCLIP add to weight names.

    A logit scale of shape [1], as some trainers save it, becomes a scalar.

    Raises:
        CheckpointError: the weights have a LoRA adapter that is not merged.
    """
    out = dict(state)
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in out)), None):
        out = {name.removeprefix(prefix): tensor for name, tensor in out.items()}
    if "text.token_embedding.weight" in out:
        out = {name.removeprefix("text."): tensor for name, tensor in out.items()}
    if adapter := next((name for name in out if _ADAPTER.search(name)), None):
        raise CheckpointError(
            f"the weights have a LoRA adapter that is not merged, such as {adapter}",
            advice="merge it first, with PEFT's merge_and_unload(), and save the model again",
        )
    if "logit_scale" in out and out["logit_scale"].numel() == 1:
        out["logit_scale"] = out["logit_scale"].reshape(())
    return out


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document
