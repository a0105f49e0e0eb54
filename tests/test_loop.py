"""The training loop with another method than the paper's."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import disk
import pytest
import torch
import toy
from processes import launched
from safetensors.torch import load_file
from tolerances import ALMOST_ZERO, SHARED_LOSSES

from tiue.distill import runs
from tiue.distill.config import RunConfig
from tiue.distill.draws import Batch
from tiue.distill.errors import DivergedError, StoppedError


def test_a_method_of_a_few_lines_learns(tmp_path):
    weight = load_file(toy.run(tmp_path, 200))["weight"]
    torch.testing.assert_close(weight, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).T, atol=0.1, rtol=0)
    log = runs.read_log(tmp_path / "losses.csv")
    assert list(log) == ["step", "loss", "model_grad", "model_lr", "samples_per_second", "seconds"]
    assert log["loss"][-20:].mean() < 0.1 * log["loss"][:5].mean()
    assert "# Toy" in (tmp_path / "report.md").read_text() and not (tmp_path / "samples").exists()


@pytest.mark.parametrize("changes", [{}, {"learning_rate_decay": "linear"}, {"ema_decay": 0.0}, {"accumulate": 3}])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, number, changes):
    """Stopped in the fifth of eight updates, two after a checkpoint."""
    whole = load_file(toy.run(tmp_path / "whole", 8, **changes))["weight"]
    update = toy.Regression.update

    def interrupted(self, step, batch):
        if step == 4:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)  # launchers and schedulers send several
        return update(self, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(toy.Regression, "update", interrupted)
        with pytest.raises(StoppedError, match=f"stopped by {number.name} after step 5, saved at step 5"):
            toy.run(tmp_path / "stopped", 8, **changes)
    assert torch.equal(load_file(toy.run(tmp_path / "stopped", 8, **changes))["weight"], whole)


def test_ctrl_c_after_a_signal_does_not_wait(tmp_path, monkeypatch):
    def signalled(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(toy.Regression, "update", signalled)
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path, 8)
    assert not runs.checkpoints(tmp_path)


def test_a_killed_run_resumes_from_its_checkpoint_or_the_one_before(tmp_path, monkeypatch, caplog):
    whole = load_file(toy.run(tmp_path / "whole", 8))["weight"]
    update = toy.Regression.update

    class Killed(BaseException):
        pass

    def killed(self, step, batch):
        if step == 7:
            raise Killed
        return update(self, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(toy.Regression, "update", killed)
        with pytest.raises(Killed):
            toy.run(tmp_path / "killed", 8)
    newest = runs.checkpoints(tmp_path / "killed")[-1]
    assert newest.name == "step-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert torch.equal(load_file(toy.run(tmp_path / "killed", 8))["weight"], whole)
    assert "step-00000006.pt is damaged" in caplog.text


def test_a_finished_run_that_could_not_be_saved_only_has_to_be_saved(tmp_path, monkeypatch):
    """The last update always has a checkpoint: eight is no multiple of three."""
    with monkeypatch.context() as patch:
        patch.setattr(toy.Regression, "save", lambda self, weights, path: Path("/none/there").write_bytes(b""))
        with pytest.raises(OSError, match="No such file"):
            toy.run(tmp_path, 8)
    monkeypatch.setattr(toy.Regression, "update", None)
    assert toy.run(tmp_path, 8).exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard
def test_a_run_outlives_a_full_disk(tmp_path, monkeypatch, caplog):
    """The disk is full from the fourth update to the sixth, and has space again."""
    whole = load_file(toy.run(tmp_path / "whole", 8))["weight"]
    update, stack = toy.Regression.update, ExitStack()

    def filling(self, step, batch):
        if step == 3:
            stack.enter_context(disk.full(largest=1))
        if step == 6:
            stack.close()
        return update(self, step, batch)

    monkeypatch.setattr(toy.Regression, "update", filling)
    with stack:
        weights = load_file(toy.run(tmp_path / "full", 8))["weight"]
    assert torch.equal(weights, whole)
    assert [path.name for path in runs.checkpoints(tmp_path / "full")] == ["step-00000003.pt", "step-00000008.pt"]
    assert runs.read_log(tmp_path / "full/losses.csv")["step"].tolist() == [*range(1, 9)]
    said = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert [text.split(" could not")[0] for text in sorted(said)] == [
        "step 4: TensorBoard's log",
        "step 4: losses.csv",
        "step 6: the checkpoint",
    ]


def test_a_longer_run_goes_on_from_the_end_of_a_shorter(tmp_path):
    whole = load_file(toy.run(tmp_path / "whole", 8))["weight"]
    toy.run(tmp_path / "parts", 5)
    assert torch.equal(load_file(toy.run(tmp_path / "parts", 8))["weight"], whole)


def test_a_run_that_diverges_saves_nothing_of_it(tmp_path):
    with pytest.raises(DivergedError, match=r"step \d+: a loss or a gradient is not finite: loss (inf|nan)"):
        toy.run(tmp_path, 20, learning_rate=1e30, learning_rate_decay="linear")
    assert not (tmp_path / "weights.safetensors").exists()


def test_a_checkpoint_of_another_method_is_refused(tmp_path, monkeypatch):
    toy.run(tmp_path, 3)
    monkeypatch.setattr(toy.Regression, "state", lambda self: {"more": torch.optim.SGD([torch.zeros(1)], 1.0)})
    with pytest.raises(ValueError, match=r"step-00000003\.pt was written by another version"):
        toy.run(tmp_path, 4)


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """Stopped after two updates and resumed, with DDP."""
    toy.run(tmp_path / "one", 4, batch_size=4)
    program = [str(Path(toy.__file__))]
    launched(program, [str(tmp_path / "two"), "2", "2"], 2)
    launched(program, [str(tmp_path / "two"), "4", "2"], 2)
    one, two = (runs.read_log(tmp_path / name / "losses.csv") for name in ("one", "two"))
    assert two["step"].tolist() == [1, 2, 3, 4]
    assert two["loss"] == pytest.approx(one["loss"], rel=SHARED_LOSSES, abs=ALMOST_ZERO)
    weights = [load_file(tmp_path / name / "weights.safetensors")["weight"] for name in ("one", "two")]
    torch.testing.assert_close(*weights, atol=SHARED_LOSSES, rtol=0)


def test_every_sample_belongs_to_one_part_of_one_process():
    """Three parts of two samples by two processes: the run reads its samples in order."""
    device = torch.device("cpu")
    batches = [Batch(0, 5, 2, 3, process, 2, device) for process in range(2)]
    read = [list(part.positions) for parts in zip(*(batch.parts for batch in batches), strict=True) for part in parts]
    assert [position for positions in read for position in positions] == list(range(60, 72))
    numbers = [torch.rand((), generator=part.generator).item() for batch in batches for part in batch.parts]
    assert len(set(numbers)) == 6
    assert batches[0].shared.uniform() == batches[1].shared.uniform()


def test_settings_that_may_change_are_those_that_weights_do_not_depend_on():
    assert "iterations" in RunConfig().changeable()
    assert "iterations" not in RunConfig(learning_rate_decay="linear").changeable()
    assert not {"seed", "batch_size", "learning_rate"} & RunConfig().changeable()
