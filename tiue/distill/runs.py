"""The files of a run. Its configuration and its checkpoints are written whole or not at all; its log grows by rows."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tiue.distill.config import DistillConfig
from tiue.files import one_line, write_text, written_whole

# Settings that a resumed run may change, because they do not change the weights on the way.
_FREE = {"checkpoint_every", "sample_every", "keep", "gradient_checkpointing", "ema_on_cpu"}
_log = logging.getLogger(__name__)


class Stateful(Protocol):
    """Anything with a state: modules, optimisers, averages."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...  # noqa: D102


def claim(out: Path, config: DistillConfig, identity: Mapping[str, str | int | None], write: bool = True) -> None:
    """Make `out` the directory of a run with `config`.

    Args:
        identity: what else must be the same when the run is resumed, by name.
        write: False in all processes of a run but one, which only compare.

    Raises:
        ValueError: it holds a run with another configuration; the message lists the differences.
    """
    path, settings = out / "config.json", json.loads(json.dumps(dataclasses.asdict(config) | identity))
    if path.exists():
        # A setting younger than the run had its default; what it was begun with is not known, if it does not say.
        begun = json.loads(path.read_text(encoding="utf-8"))
        begun = (
            settings
            | json.loads(json.dumps(dataclasses.asdict(DistillConfig.of(begun))))
            | {name: value for name, value in begun.items() if name in identity}
        )
        # The weight of the CLIP loss falls over all iterations.
        free = _FREE if config.clip_weight else _FREE | {"iterations"}
        names = [n for n in settings if n not in free and begun[n] != settings[n]]
        if names:
            differences = ", ".join(f"{n} {begun[n]!r} -> {settings[n]!r}" for n in names)
            raise ValueError(f"{out} holds a run with another configuration: {differences}")
    if write:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")


def save(out: Path, state: Mapping[str, Any], step: int, keep: int) -> Path:
    """Write the checkpoint of `step` finished iterations, then delete all but the newest `keep`.

    state: the state dictionary of every part, by name. Raises OSError, with the older checkpoints as they were.
    """
    directory = out / "checkpoints"
    directory.mkdir(exist_ok=True)
    for unfinished in directory.glob(".*.tmp"):  # a killed process left it
        unfinished.unlink()
    path = directory / f"step-{step:08}.pt"
    try:
        with written_whole(path) as temporary, temporary.open("wb") as file:
            torch.save({"step": step, **state}, file)
    except RuntimeError as error:  # torch.save raises it while it handles the full disk's OSError
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    for old in checkpoints(out)[:-keep]:
        old.unlink()
    return path


def restore(out: Path, state: Mapping[str, Stateful]) -> int:
    """Load the newest checkpoint that is whole, if there is one, and return the number of finished iterations."""
    for path in reversed(checkpoints(out)):
        try:
            saved = _load(path)
        except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            _log.warning("%s is damaged, so the run goes on from the one before: %s", path, one_line(error))
            continue
        for name, part in state.items():
            if name in saved or name != "grad_scaler":  # which runs did not always keep: it finds its scale again
                part.load_state_dict(saved[name])
        return saved["step"]
    return 0


def _load(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that it writes
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


class Log:
    """losses.csv: a row per iteration. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, first: int, columns: Sequence[str]):
        kept: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                whole = [line for line in file if line.endswith("\n")]  # a run may have stopped within a row
            kept = [row for row in csv.reader(whole) if row and (row[0] == "step" or int(row[0]) <= first)]
            with written_whole(path) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows(kept)
        self._file = path.open("a", newline="")
        self._rows = csv.writer(self._file)
        self._columns = kept[0][1:] if kept else list(columns)
        if not kept:
            self._rows.writerow(["step", *self._columns])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row, with nothing in the columns that `values` does not name, and let others see it."""
        self._rows.writerow([step, *(f"{values[name]:.6g}" if name in values else "" for name in self._columns)])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of a `Log`, with NaN where a row has nothing."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns, rows = reader.fieldnames or (), list(reader)
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns}


def checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    return sorted((out / "checkpoints").glob("step-*.pt"))
