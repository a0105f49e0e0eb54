"""Captions to distil on, from a text file."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def load_prompts(path: Path) -> list[str]:
    """Read prompts: one per line of a .txt, or the "prompt" (else "caption", else "text") of every line of a .jsonl.

    Blank lines are skipped and repetitions dropped; the order is kept.

    Raises:
        ValueError: no such file, another suffix, not UTF-8, a malformed line, or no prompt at all.
    """
    readers = {".txt": str.strip, ".jsonl": _from_json}
    if path.suffix not in readers:
        raise ValueError(f"{path}: prompts come from a .txt or a .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    prompts: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts[readers[path.suffix](line)] = None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return list(prompts)


def _from_json(line: str) -> str:
    record = json.loads(line)
    keys = ("prompt", "caption", "text")
    if isinstance(record, dict):
        for key in keys:
            if isinstance(record.get(key), str) and record[key].strip():
                return record[key].strip()
    raise ValueError(f"expected an object with one of {', '.join(keys)}, received {line.strip()[:80]}")


class PromptOrder:
    """An endless seeded order: each epoch is a new permutation, and any position is known without those before it."""

    def __init__(self, prompts: list[str], seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> str:
        epoch, index = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._prompts), generator=generator)
        return self._prompts[self._order[index]]
