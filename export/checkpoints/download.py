"""Download of published weights: OpenAI's files by URL, Hugging Face repositories by id.

Both are cached in the Hugging Face cache directory, which HF_HOME sets. HF_HUB_OFFLINE=1 disables
all downloads.
"""

from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from export.checkpoints.layouts import OPEN_CLIP_WEIGHTS, is_hugging_face
from serving.errors import CheckpointError
from serving.util.files import sha256_of

_SMALL = ["*.json", "merges.txt"]
_HUGGING_FACE = ("model*.safetensors", "pytorch_model*.bin")


def download_file(url: str, sha256: str) -> Path:
    """Return the cached file of `url`, downloading it if needed.

    Raises:
        CheckpointError: the file cannot be downloaded, or its sha256 is not `sha256`.
    """
    target = Path(constants.HF_HOME) / "clip-deploy" / sha256[:12] / url.rsplit("/", 1)[-1]
    if not target.exists():
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{url} is not in the cache and HF_HUB_OFFLINE is set",
                advice=f"put the file at {target}",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # This downloads to a temporary file, checks the hash, then renames the file.
            torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{url} could not be downloaded: {error}") from error
    if (found := sha256_of(target)) != sha256:
        raise CheckpointError(
            f"{target} has sha256 {found}, but its publisher states {sha256}",
            advice="delete it and try again",
        )
    return target


def download_hub(repo: str, revision: str | None = None, *, only_tokenizer: bool = False) -> Path:
    """Return a local directory with the repository's configuration, tokenizer and weights.

    Only one form of the weights is downloaded: safetensors if the repository has them, otherwise a
    pickle.

    Args:
        repo: id of a Hugging Face hub repository, in Hugging Face's or OpenCLIP's layout.
        revision: branch, tag or commit. Default: the main branch.
        only_tokenizer: download only `tokenizer.json`.

    Raises:
        CheckpointError: the repository cannot be downloaded, or is not a CLIP checkpoint.
    """
    if only_tokenizer:
        return _snapshot(repo, revision, ["tokenizer.json"], "tokenizer.json")
    path = _snapshot(repo, revision, _SMALL, "*config.json")
    kinds = _HUGGING_FACE if is_hugging_face(path) else OPEN_CLIP_WEIGHTS
    for kind in kinds:
        path = _snapshot(repo, revision, [*_SMALL, kind], "*config.json")
        if any(path.glob(kind)):
            return path
    raise CheckpointError(f"{repo} has no weights; expected one of {', '.join(kinds)}")


def _snapshot(repo: str, revision: str | None, patterns: list[str], needed: str) -> Path:
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        place = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{repo!r}{place} could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})",
            advice="check the id (`clip-deploy list` shows known ones) and the network, or give a "
            "local directory",
        ) from error
    if not any(path.glob(needed)):
        raise CheckpointError(f"{repo} has no {needed}; it is not a CLIP checkpoint")
    return path
