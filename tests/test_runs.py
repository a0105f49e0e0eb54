from pathlib import Path

import pytest
import torch
from torch import nn

from tiue import runs


def test_a_log_goes_on_after_its_last_whole_row(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_bytes(b"step,vsd\r\n1,0.5\r\n\r\n2,0.25\r\n3,0.1\r\n4")
    log = runs.Log(path, 2)
    log.write(3, {"vsd": 0.125})
    log.close()
    assert path.read_bytes() == b"step,vsd\r\n1,0.5\r\n2,0.25\r\n3,0.125\r\n"


@pytest.mark.parametrize("cut", [b"", b"st", b"step,vsd\r"])
def test_a_log_without_a_whole_row_begins_anew(tmp_path, cut):
    (tmp_path / "losses.csv").write_bytes(cut)
    log = runs.Log(tmp_path / "losses.csv", 7)
    log.write(8, {"vsd": 1.0})
    log.close()
    assert (tmp_path / "losses.csv").read_bytes() == b"step,vsd\r\n8,1\r\n"


def test_a_log_that_cannot_be_shortened_stays_whole(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError("No space left on device")

    path = tmp_path / "losses.csv"
    path.write_bytes(before := b"step,vsd\r\n1,0.5\r\n2,0.25\r\n")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        runs.Log(path, 1)
    assert path.read_bytes() == before


def test_a_fingerprint_sees_names_shapes_and_values():
    def linear(*shape: int, change: float = 0.0) -> nn.Linear:
        module = nn.Linear(*shape)
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        with torch.no_grad():
            module.weight[:, 5] += change
        return module

    same = runs.fingerprint(linear(512, 512))
    assert runs.fingerprint(linear(512, 512)) == same and len(same) == 16
    others = [linear(512, 512, change=1e-3), linear(256, 1024), nn.Sequential(linear(512, 512))]
    assert same not in map(runs.fingerprint, others)
