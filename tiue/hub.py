"""Models on the Hugging Face Hub. This is the only module that uses a network, and only for a model that was named."""

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
    """A model cannot be downloaded from the Hub; the message says why, in one line."""


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here may be a Hub id, owner/name, rather than a mistyped path."""
    is_id = len(name) <= _LONGEST_ID and _ID.fullmatch(name) is not None
    return is_id and not name.endswith(_FILES) and not is_directory(Path(name).parent)


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, so that only earlier downloads are used."""
    return constants.HF_HUB_OFFLINE


def list_files(hub_id: str) -> list[str]:
    """Return the paths of a model's files. Raises HubError."""
    try:
        return HfApi().list_repo_files(hub_id)
    except (OSError, ValueError) as error:
        raise HubError(_reason(hub_id, error)) from error


def fetch(hub_id: str, patterns: Sequence[str]) -> Path:
    """Download files of a model into the Hub's cache, unless they are there, and return the snapshot's directory.

    Args:
        patterns: name the files. They are ignored while offline, where the cache holds what was downloaded.

    Raises:
        HubError: the download failed.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), local_files_only=offline()))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: from the Hub's transfer library
        raise HubError(_reason(hub_id, error)) from error


def _reason(hub_id: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"{hub_id} is gated: accept its terms on huggingface.co, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub_id} is neither a path here nor a model on the Hugging Face Hub (if private: `hf auth login`)"
    if isinstance(error, LocalEntryNotFoundError) and offline():
        return f"{hub_id} is not a path here, nor was it downloaded before, and HF_HUB_OFFLINE is set"
    first = next(iter(str(error).strip().splitlines()), "")
    what = first if 0 < len(first) < 150 else type(error).__name__  # some messages hold whole responses
    return (
        f"{hub_id} is not a path here, and cannot be downloaded from the Hugging Face Hub: {what} "
        "(HF_HUB_OFFLINE=1 uses an earlier download)"
    )
