import io
from pathlib import Path

import disk
import numpy as np
import pytest
import torch
from torch import nn

from tiue import files
from tiue.distill import runs


def test_a_log_goes_on_after_its_last_whole_row(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_bytes(b"step,vsd\r\n1,0.5\r\n\r\n2,0.25\r\n3,0.1\r\n4")
    log = runs.Log(path, 2, ["other"])
    log.write(3, {"vsd": 0.125})
    log.close()
    assert path.read_bytes() == b"step,vsd\r\n1,0.5\r\n2,0.25\r\n3,0.125\r\n"


@pytest.mark.parametrize("cut", [b"", b"st", b"step,vsd\r"])
def test_a_log_without_a_whole_row_begins_anew(tmp_path, cut):
    (tmp_path / "losses.csv").write_bytes(cut)
    log = runs.Log(tmp_path / "losses.csv", 7, ["vsd", "kl"])
    log.write(8, {"vsd": 1.0})
    log.close()
    assert (tmp_path / "losses.csv").read_bytes() == b"step,vsd,kl\r\n8,1,\r\n"


def test_the_columns_of_a_log_are_read(tmp_path):
    log = runs.Log(tmp_path / "losses.csv", 0, ["vsd", "kl"])
    log.write(1, {"vsd": 0.5})
    log.write(2, {"vsd": 0.25, "kl": 3.0})
    log.close()
    columns = runs.read_log(tmp_path / "losses.csv")
    assert list(columns) == ["step", "vsd", "kl"] and columns["step"].tolist() == [1, 2]
    assert columns["vsd"].tolist() == [0.5, 0.25] and np.isnan(columns["kl"][0]) and columns["kl"][1] == 3.0


def test_a_log_of_a_head_alone_has_empty_columns(tmp_path):
    (tmp_path / "vae.csv").write_text("step,loss\n")
    assert {name: column.tolist() for name, column in runs.read_log(tmp_path / "vae.csv").items()} == {
        "step": [],
        "loss": [],
    }


def test_a_log_that_cannot_be_shortened_stays_whole(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError("No space left on device")

    path = tmp_path / "losses.csv"
    path.write_bytes(before := b"step,vsd\r\n1,0.5\r\n2,0.25\r\n")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        runs.Log(path, 1, [])
    assert path.read_bytes() == before


def test_a_fingerprint_sees_names_shapes_and_values():
    def linear(*shape: int, change: float = 0.0) -> nn.Linear:
        module = nn.Linear(*shape)
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        with torch.no_grad():
            module.weight[:, 5] += change
        return module

    same = files.fingerprint(linear(512, 512))
    assert files.fingerprint(linear(512, 512)) == same and len(same) == 16
    others = [linear(512, 512, change=1e-3), linear(256, 1024), nn.Sequential(linear(512, 512))]
    assert same not in map(files.fingerprint, others)


class Counted:
    """A state of one number."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": torch.tensor(2**40 + self.value)}

    def load_state_dict(self, state):
        self.value = int(state["value"]) - 2**40


def saved(out: Path, *steps: int, keep=9) -> Path:
    for step in steps:
        path = runs.save(out, {"part": Counted(step).state_dict()}, step, keep)
    return path


def restored(out: Path) -> tuple[int, int]:
    part = Counted()
    return runs.restore(out, {"part": part}), part.value


def test_checkpoints_rotate(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-00000003.pt", "step-00000004.pt"]
    assert restored(tmp_path) == (4, 4)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:200])


def emptied(path):
    path.write_bytes(b"")


def of_another_compression(path):
    content = path.read_bytes()
    for signature, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        at = content.index(signature) + place
        content = content[:at] + b"\x08" + content[at + 1 :]
    path.write_bytes(content)


def flipped(path):
    """One bit of a stored number, which torch.load does not notice."""
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(2**40 + 2).numpy().tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, emptied, flipped, of_another_compression])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, damage):
    damage(path := saved(tmp_path, 1, 2))
    assert restored(tmp_path) == (1, 1)
    assert "step-00000002.pt is damaged" in caplog.text
    with pytest.raises(ValueError, match=r"step-00000002\.pt is damaged"):
        runs.averaged(path)


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path):
    """The run goes on from step 1, and is stopped before step 4."""
    emptied(saved(tmp_path, 1, 4))
    saved(tmp_path, 2, 3, keep=2)
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000003.pt"]


def test_without_a_whole_checkpoint_a_run_begins_anew(tmp_path, caplog):
    emptied(saved(tmp_path, 1))
    assert restored(tmp_path) == (0, 0)
    assert "is damaged" in caplog.text


def test_a_checkpoint_that_finds_no_space_leaves_those_that_there_are(tmp_path):
    saved(tmp_path, 1)
    with disk.full(4096), pytest.raises(OSError, match="too large"):
        runs.save(tmp_path, {"part": {"value": torch.zeros(10_000)}}, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


def test_an_interrupted_checkpoint_leaves_those_that_there_are(tmp_path, monkeypatch):
    """A second Ctrl-C while it is written."""

    class Interrupted(io.BytesIO):
        def write(self, data):
            if self.tell():
                raise KeyboardInterrupt
            return super().write(data)

    saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, _: self.touch() or Interrupted())
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


def test_a_read_only_file_is_not_replaced(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("kept")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        files.write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"] and path.read_text() == "kept"
