"""The files of a run. Settings and checkpoints are written whole or not at all; the log grows by rows."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import pickle
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tiue.distill.config import RunConfig
from tiue.files import one_line, shortened, write_text, written_whole

_FORMAT = 2  # of checkpoints
# Raised by torch and zipfile for a damaged checkpoint.
_DAMAGE = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
_log = logging.getLogger(__name__)

Identity = Mapping[str, str | int | None]


class Stateful(Protocol):
    """Anything with a state: modules, optimizers, averages."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...  # noqa: D102


def check_same_run(out: Path, config: RunConfig, identity: Identity, free: Collection[str] = ()) -> None:
    """Refuse a directory that holds another run. An empty or missing directory is free.

    Args:
        out: directory of the run.
        config: the settings. Those in `config.changeable()` may differ.
        identity: further values that must be the same when a run resumes, by name, for example a fingerprint.
        free: names of settings that may differ, too. A finished run has `mixed_precision`: it serves all machines.

    Raises:
        ValueError: the message lists the differences, or config.json is damaged.
    """
    if not (path := out / "config.json").exists():
        return
    # Settings that an older config.json lacks had their defaults. Identity entries that it lacks cannot be compared.
    wanted = _recorded(config, identity)
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected the settings of a run: {one_line(error)}") from error
    found = wanted | _recorded(type(config)(), {}) | {name: found[name] for name in found.keys() & wanted.keys()}
    may_differ = config.changeable().union(free)
    names = [name for name in wanted if name not in may_differ and found[name] != wanted[name]]
    if names:
        differences = ", ".join(f"{n} {shortened(repr(found[n]))} -> {shortened(repr(wanted[n]))}" for n in names)
        raise ValueError(f"{out} holds a run with another configuration: {differences}")


def record_run(out: Path, config: RunConfig, identity: Identity) -> None:
    """Write config.json, which makes `out` the directory of a run."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", json.dumps(_recorded(config, identity), indent=2) + "\n")


def _recorded(config: RunConfig, identity: Identity) -> dict[str, Any]:
    """Return the content of config.json, in the form in which it is read back."""
    return json.loads(json.dumps(dataclasses.asdict(config) | dict(identity)))


def save(out: Path, state: Mapping[str, Any], step: int, keep: int) -> Path:
    """Write a checkpoint, then delete all but this one and those before it, `keep` in all.

    A checkpoint of a later step is damaged, or the run would have resumed from it. It is deleted, too.

    Args:
        out: directory of the run.
        state: the state dictionary of every part, by name.
        step: the number of finished updates.
        keep: how many checkpoints stay, at least 1.

    Returns:
        The path of the checkpoint.

    Raises:
        OSError: it could not be written. The older checkpoints are unchanged.
        KeyboardInterrupt: as for OSError.
    """
    directory = out / "checkpoints"
    directory.mkdir(exist_ok=True)
    for unfinished in directory.glob(".*.tmp"):  # files of killed processes
        unfinished.unlink()
    path = directory / f"step-{step:08}.pt"
    try:
        with written_whole(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": _FORMAT, "step": step, "state": dict(state)}, file)
    except RuntimeError as error:  # torch.save raises it from the OSError of a full disk, or from a second Ctrl-C.
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from None
        raise
    found = checkpoints(out)
    kept = found[: found.index(path) + 1][-keep:]
    for other in found:
        if other not in kept:
            other.unlink()
    return path


def restore(out: Path, state: Mapping[str, Stateful]) -> int:
    """Load the newest undamaged checkpoint, if there is one.

    Returns:
        The number of finished updates.

    Raises:
        ValueError: a checkpoint was written by another version of the trainer, or holds other parts.
    """
    for path in reversed(checkpoints(out)):
        try:
            saved = _load(path)
        except ValueError as error:
            _log.warning("%s, so the run resumes from the one before", error)
            continue
        if saved.get("format") != _FORMAT or saved["state"].keys() != state.keys():
            raise ValueError(
                f"{path} was written by another version of the trainer: resume the run with that version, "
                "or begin a new run in another directory"
            )
        for name, part in state.items():
            part.load_state_dict(saved["state"][name])
        return saved["step"]
    return 0


def averaged(path: Path) -> list[torch.Tensor]:
    """Read the averaged parameters of a checkpoint, in the order of `named_parameters` of the method's model.

    Raises:
        ValueError: the checkpoint is damaged, or its run had no average.
    """
    found = _load(path)["state"]["average"].get("shadow_params")
    if found is None:
        raise ValueError(f"{path} has no average: its run had `ema_decay` 0")
    return found


def _load(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Raises ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not verify its own checksums.
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error


class Log:
    """losses.csv: a row per update. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, first: int, columns: Sequence[str]):
        kept: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                whole = [line for line in file if line.endswith("\n")]  # Drop half a row of a killed process.
            kept = [row for row in csv.reader(whole) if row and (row[0] == "step" or int(row[0]) <= first)]
            with written_whole(path) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows(kept)
        self._file = path.open("a", newline="")
        self._rows = csv.writer(self._file)
        self._columns = kept[0][1:] if kept else list(columns)
        if not kept:
            self._rows.writerow(["step", *self._columns])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row and flush it. Columns that `values` does not name stay empty.

        Raises:
            OSError: the disk is full. The next call that finds space writes the row, too.
        """
        self._rows.writerow([step, *(f"{values[name]:.6g}" if name in values else "" for name in self._columns)])
        self._file.flush()

    def close(self) -> None:
        """Close the file. If the disk is full, as `write` has said, the last rows are lost."""
        with suppress(OSError):
            self._file.close()


def read_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read the columns of a `Log`. Empty cells become NaN."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns, rows = reader.fieldnames or (), list(reader)
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns}


def checkpoints(out: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-*.pt"))
