"""Text embeddings of a run's captions: computed once and kept on the disk, or computed for every batch."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from tiue import files
from tiue.components import Components
from tiue.distill.config import autocast_dtype
from tiue.text_encoder import encode_text

_BATCH = 64  # captions encoded at once
NOTE_EVERY = 100  # batches between two progress messages
_log = logging.getLogger(__name__)


class TextEmbeddings(Protocol):
    """Text embeddings by the number of a caption."""

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Return the embeddings of these captions, float32 (n, L, D)."""
        ...


class EncodedTexts:
    """Text embeddings that are computed at every access, on the text encoder's device."""

    def __init__(self, components: Components, prompts: Sequence[str]):
        self._components, self._prompts = components, prompts

    @torch.no_grad()
    def rows(self, indices: Sequence[int]) -> Tensor:
        """Encode these captions, float32 (n, L, D)."""
        return encode_text(self._components, [self._prompts[i] for i in indices]).float()


class CachedTexts:
    """Text embeddings in a memory-mapped file, which `cache_texts` makes."""

    def __init__(self, values: Tensor, device: torch.device):
        self._values, self._device = values, device

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Read the embeddings of these captions, float32 (n, L, D)."""
        return self._values[torch.tensor(indices)].to(self._device).float()


def cache_texts(
    components: Components, prompts: Sequence[str], digest: str, directory: Path, accelerator: Accelerator
) -> CachedTexts:
    """Encode all captions into a file. Every process does its part. An interrupted encoding resumes.

    With mixed precision, the file stores embeddings in that precision. The UNet would round them anyway, so results do
    not change.

    Args:
        components: the model. Its text encoder must be on the device of the run.
        prompts: the captions.
        digest: the fingerprint of the captions.
        directory: of the file, the same for all processes.
        accelerator: of the run.

    Returns:
        The embeddings.

    Raises:
        ValueError: the disk has too little space.
    """
    dtype = autocast_dtype(accelerator.mixed_precision) or torch.float32
    example = EncodedTexts(components, [""]).rows([0])
    shape = (len(prompts), *example.shape[1:])
    path, note = directory / "embeddings.bin", directory / "embeddings.json"
    known = {
        "prompts": digest,
        "text_encoder": files.fingerprint(components.text_encoder),
        "tokenizer": files.digest([components.tokenizer.backend_tokenizer.to_str()]),
        "dtype": str(dtype),
        "shape": list(shape),
        "processes": accelerator.num_processes,
    }
    if accelerator.is_main_process:
        _make_file(path, note, known, shape, dtype)
    accelerator.wait_for_everyone()
    values = torch.from_file(str(path), shared=True, size=shape[0] * shape[1] * shape[2], dtype=dtype).view(shape)
    _fill(values, EncodedTexts(components, prompts), path, accelerator)
    accelerator.wait_for_everyone()
    return CachedTexts(values, accelerator.device)


def _make_file(path: Path, note: Path, known: dict[str, object], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Make the file, unless it exists for these captions. It need not be complete."""
    size = shape[0] * shape[1] * shape[2] * dtype.itemsize
    there = files.is_file(path) and path.stat().st_size == size
    if there and note.exists() and json.loads(note.read_text(encoding="utf-8")) == known:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob("embeddings*"):
        old.unlink()
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ValueError(
            f"{path.parent}: the text embeddings of {shape[0]:,} prompts take {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: make space, or turn `text_cache` off"
        )
    with path.open("wb") as file:
        file.truncate(size)
    files.write_text(note, json.dumps(known))


def _fill(values: Tensor, encoded: EncodedTexts, path: Path, accelerator: Accelerator) -> None:
    """Encode this process's part: every num_processes-th batch."""
    process, processes = accelerator.process_index, accelerator.num_processes
    progress = path.with_name(f"embeddings.{process}.done")
    batches = range(process, -(-len(values) // _BATCH), processes)
    done = int(progress.read_text()) if progress.exists() else 0
    if done < len(batches) and accelerator.is_main_process:
        _log.info("encoding %d captions", len(values))
    for i in range(done, len(batches)):
        first = batches[i] * _BATCH
        rows = range(first, min(first + _BATCH, len(values)))
        values[first : rows.stop] = encoded.rows(rows).to(values.dtype).cpu()
        if (i + 1) % NOTE_EVERY == 0 or i + 1 == len(batches):
            with path.open("r+b") as file:
                files.sync(file)
            files.write_text(progress, str(i + 1))


def cut_prompts(components: Components, prompts: Sequence[str]) -> int:
    """Count the captions that are longer than the text encoder's limit. They are cut there."""
    tokenizer, cut = components.tokenizer, 0
    for first in range(0, len(prompts), 1024):
        tokens = tokenizer(list(prompts[first : first + 1024]), truncation=False, verbose=False).input_ids
        cut += sum(len(ids) > tokenizer.model_max_length for ids in tokens)
    return cut
