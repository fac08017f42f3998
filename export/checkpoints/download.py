"""Fetch published weights: OpenAI's files by URL and sha256, the hub's repositories by id.

Both keep what they fetched in the Hugging Face cache directory, so HF_HOME moves it and
HF_HUB_OFFLINE=1 keeps either from touching the network.
"""

from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from serving.errors import CheckpointError
from serving.util.files import sha256_of

_SMALL = ["*.json", "merges.txt"]


def download_file(url: str, sha256: str) -> Path:
    """The file behind `url`, from the cache when it is there, checked against `sha256`."""
    target = Path(constants.HF_HOME) / "clip-deploy" / sha256[:12] / url.rsplit("/", 1)[-1]
    if not target.exists():
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{url} is not in the cache and HF_HUB_OFFLINE is set; put the file at {target}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Writes to a temporary name, checks the hash, then renames; shows its progress.
            torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{url} could not be downloaded: {error}") from error
    if (found := sha256_of(target)) != sha256:
        raise CheckpointError(
            f"{target} has sha256 {found}, its publisher says {sha256}; delete it and try again"
        )
    return target


def download_hub(repo: str, *, only_tokenizer: bool = False) -> Path:
    """A local directory with the repository's configuration and, by default, its weights.

    Weights are fetched in the best form the repository has: Hugging Face safetensors, then
    Hugging Face pickles, then OpenCLIP's.
    """
    if only_tokenizer:
        return _snapshot(repo, ["tokenizer.json"], "tokenizer.json")
    path = _snapshot(repo, _SMALL, "*config.json")
    if (path / "config.json").exists():
        kinds = ("model*.safetensors", "pytorch_model*.bin")
    else:
        kinds = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    for kind in kinds:
        path = _snapshot(repo, [*_SMALL, kind], "*config.json")
        if any(path.glob(kind)):
            return path
    raise CheckpointError(f"{repo} holds no weights; expected one of {', '.join(kinds)}")


def _snapshot(repo: str, patterns: list[str], needed: str) -> Path:
    try:
        path = Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repo!r} could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the id "
            "(`clip-deploy list` shows known ones), the network, or give a local directory"
        ) from error
    if not any(path.glob(needed)):
        raise CheckpointError(f"{repo} holds no {needed}; it is not a CLIP checkpoint")
    return path
