"""The files of a run: its configuration, its checkpoints and its log. All are written whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tiue.config import DistillConfig

# Settings that a resumed run may change, because they do not change the weights on the way.
_FREE = {"iterations", "checkpoint_every", "sample_every", "keep"}


class Stateful(Protocol):
    """Anything with a state: modules, optimisers, averages."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...  # noqa: D102


class Tensors:
    """A list of tensors as a state: of a frozen network with adapters, only what is trained is kept."""

    def __init__(self, tensors: Iterable[Tensor]):
        self._tensors = list(tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by position."""
        return {str(index): tensor.detach() for index, tensor in enumerate(self._tensors)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the values in."""
        for index, tensor in enumerate(self._tensors):
            tensor.copy_(state[str(index)])


def claim(out: Path, config: DistillConfig) -> None:
    """Make `out` the directory of a run with `config`.

    Raises:
        ValueError: it holds a run with another configuration; the message lists the differences.
    """
    path, settings = out / "config.json", dataclasses.asdict(config)
    if path.exists():
        # A setting younger than the run had its default.
        begun = dataclasses.asdict(DistillConfig()) | json.loads(path.read_text(encoding="utf-8"))
        names = [n for n in settings if n not in _FREE and begun[n] != settings[n]]
        if names:
            differences = ", ".join(f"{n} {begun[n]!r} -> {settings[n]!r}" for n in names)
            raise ValueError(f"{out} holds a run with another configuration: {differences}")
    out.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def save(out: Path, state: Mapping[str, Stateful], step: int, keep: int) -> None:
    """Write the checkpoint of `step` finished iterations, then delete all but the newest `keep`."""
    directory = out / "checkpoints"
    directory.mkdir(exist_ok=True)
    temporary = directory / "writing.tmp"
    torch.save({"step": step, **{name: part.state_dict() for name, part in state.items()}}, temporary)
    temporary.replace(directory / f"step-{step:08}.pt")
    for old in _checkpoints(out)[:-keep]:
        old.unlink()


def restore(out: Path, state: Mapping[str, Stateful], device: torch.device) -> int:
    """Load the newest checkpoint, if there is one, and return the number of finished iterations."""
    found = _checkpoints(out)
    if not found:
        return 0
    saved = torch.load(found[-1], map_location=device, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["step"]


class Log:
    """losses.csv: a row per iteration. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, first: int):
        kept: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.reader(file) if row[0] == "step" or int(row[0]) <= first]
        self._file = path.open("w", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerows(kept)
        self._empty = not kept

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row, and let others see it."""
        if self._empty:
            self._rows.writerow(["step", *values])
            self._empty = False
        self._rows.writerow([step, *(f"{value:.6g}" for value in values.values())])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    return sorted((out / "checkpoints").glob("step-*.pt"))
