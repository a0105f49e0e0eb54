"""Captions on the disk, each once, and the seeded order in which a run reads them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiue.files import written_whole

_DIGEST_BYTES = 16


class Prompts(Sequence[str]):
    """Unique captions in a file that `store_prompts` made. Each one is read from the file at every access."""

    def __init__(self, directory: Path):
        self._ends = np.load(directory / "ends.npy", mmap_mode="r")
        text = directory / "text.bin"
        self._text = np.memmap(text, np.uint8, "r") if text.stat().st_size else np.empty(0, np.uint8)
        self.digest = (directory / "digest").read_text()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)} prompts")
        index %= len(self)
        begin = int(self._ends[index - 1]) if index else 0
        return bytes(self._text[begin : int(self._ends[index])]).decode()


def store_prompts(captions: Iterable[str], directory: Path) -> int:
    """Write captions for `Prompts`, each once, in the order of their first appearance.

    Memory holds about 100 bytes per caption, to recognize repetitions. Processes that have the store open keep reading
    its old captions.

    Returns:
        The number of repetitions.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "digest").unlink(missing_ok=True)  # A store without a digest cannot be opened.
    ends, seen, total = array("q"), set[bytes](), 0
    whole = hashlib.sha256()
    with written_whole(directory / "text.bin") as temporary, temporary.open("wb") as file:
        end = 0
        for caption in captions:
            total += 1
            encoded = caption.encode()
            known = hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).digest()
            if known not in seen:
                seen.add(known)
                end += file.write(encoded)
                ends.append(end)
                whole.update(len(encoded).to_bytes(8, "little") + encoded)
    with written_whole(directory / "ends.npy") as temporary, temporary.open("wb") as file:
        np.save(file, np.array(ends, np.int64))
    (directory / "digest").write_text(whole.hexdigest()[:16])
    return total - len(ends)


class PromptOrder:
    """An endless seeded order of 0..count-1. Each epoch is a new permutation, computed without earlier epochs."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self._count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._count, generator=generator)
        return int(self._order[index])
