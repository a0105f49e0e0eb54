"""Small helpers for files: atomic writes, fingerprints of weights and texts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from torch import nn


def fingerprint(*modules: nn.Module) -> str:
    """16 hex digits by which weights are known again: of all tensors the name, the shape and some 100 values."""
    hashed = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            values = tensor.detach().flatten()
            values = values[:: values.numel() // 64 | 1]  # odd, so that it does not stay within a column
            hashed.update(f"{name} {list(tensor.shape)}".encode())
            hashed.update(values.double().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def digest(texts: Sequence[str]) -> str:
    """16 hex digits by which texts, in their order, are known again."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        synced(file)
    temporary.replace(path)


def synced(file: IO[Any]) -> None:
    """Have on the disk what was written, before anything is that says so."""
    file.flush()
    os.fsync(file.fileno())


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
