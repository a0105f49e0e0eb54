"""Models on the Hugging Face Hub. Only this module uses a network, and only for a model that the user named."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from tiue.files import is_directory

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LONGEST_ID = 96  # characters, as the Hub allows
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".json", ".onnx")


class HubError(ValueError):
    """A model cannot be downloaded from the Hub. The message says why, in one line."""


def is_hub_id(name: str) -> bool:
    """Say whether a name that is no local path looks like a Hub id, owner/name, and not like a mistyped path."""
    is_id = len(name) <= _LONGEST_ID and _ID.fullmatch(name) is not None
    return is_id and not name.endswith(_FILES) and not is_directory(Path(name).parent)


def offline() -> bool:
    """Say whether HF_HUB_OFFLINE is set, so that only earlier downloads are used."""
    return constants.HF_HUB_OFFLINE


def list_files(hub_id: str) -> list[str]:
    """Return the paths of a model's files. Raises HubError."""
    try:
        return HfApi().list_repo_files(hub_id)
    except (OSError, ValueError) as error:
        raise HubError(_reason(hub_id, error)) from error


def fetch(hub_id: str, patterns: Sequence[str]) -> Path:
    """Download files of a model into the Hub's cache, unless they are already there.

    Args:
        hub_id: owner/name.
        patterns: glob patterns of the files. Offline, they are ignored, and the cache is used as it is.

    Returns:
        The snapshot's directory.

    Raises:
        HubError: the download failed.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), local_files_only=offline()))
    except (OSError, ValueError, RuntimeError) as error:  # The Hub's transfer library raises RuntimeError.
        raise HubError(_reason(hub_id, error)) from error


def _reason(hub_id: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"{hub_id} is gated: accept its terms on huggingface.co, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub_id} is neither a path here nor a model on the Hugging Face Hub (if private: `hf auth login`)"
    if isinstance(error, LocalEntryNotFoundError) and offline():
        return f"{hub_id} is not a path here, nor was it downloaded before, and HF_HUB_OFFLINE is set"
    first = next(iter(str(error).strip().splitlines()), "")
    what = first if 0 < len(first) < 150 else type(error).__name__  # Some messages hold whole responses.
    return (
        f"{hub_id} is not a path here, and cannot be downloaded from the Hugging Face Hub: {what} "
        "(HF_HUB_OFFLINE=1 uses an earlier download)"
    )
