"""The files of a run. Its configuration and its checkpoints are written whole or not at all; its log grows by rows."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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


def claim(out: Path, config: DistillConfig, identity: Mapping[str, str | int | None], write: bool = True) -> None:
    """Make `out` the directory of a run with `config`.

    Args:
        identity: what else must be the same when the run is resumed, by name.
        write: False in all processes of a run but one, which only compare.

    Raises:
        ValueError: it holds a run with another configuration; the message lists the differences.
    """
    path, settings = out / "config.json", dataclasses.asdict(config) | identity
    if path.exists():
        # A setting younger than the run had its default; what it was begun with is not known, if it does not say.
        begun = dataclasses.asdict(DistillConfig()) | identity | json.loads(path.read_text(encoding="utf-8"))
        names = [n for n in settings if n not in _FREE and begun[n] != settings[n]]
        if names:
            differences = ", ".join(f"{n} {begun[n]!r} -> {settings[n]!r}" for n in names)
            raise ValueError(f"{out} holds a run with another configuration: {differences}")
    if not write:
        return
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
        if name in saved or name != "grad_scaler":  # which runs did not always keep: it finds its scale again
            part.load_state_dict(saved[name])
    return saved["step"]


class Log:
    """losses.csv: a row per iteration. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, first: int):
        kept: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                whole = [line for line in file if line.endswith("\n")]  # a run may have stopped within a row
            kept = [row for row in csv.reader(whole) if row and (row[0] == "step" or int(row[0]) <= first)]
            temporary = path.with_suffix(".tmp")
            with temporary.open("w", newline="") as file:
                csv.writer(file).writerows(kept)
            temporary.replace(path)
        self._file = path.open("a", newline="")
        self._rows = csv.writer(self._file)
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
