import csv
import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tolerances import REORDERED

from tiue.checkpoint import Student, load_student
from tiue.cli import main
from tiue.config import DistillConfig
from tiue.distill import Distillation, Draw
from tiue.losses import kl_loss
from tiue.schedule import closed_form

CONFIG = DistillConfig(
    iterations=4,
    batch_size=2,
    learning_rate=1e-4,
    lora_rank=2,
    lora_alpha=2,
    checkpoint_every=2,
    sample_every=4,
)
PROMPTS = ["a red heart", "a cat", "the sea", "a house", "x"]


@pytest.fixture(scope="module")
def teacher_directory(tmp_path_factory) -> Path:
    return tiny.save_pipeline(tiny.emoji(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def distil(out: Path, components=None, **changes) -> Path:
    config = dataclasses.replace(CONFIG, **changes)
    return Distillation(components or tiny.emoji(), PROMPTS, out, config).run(progress=False)


def test_a_run_writes_a_student_with_everything_beside_it(tmp_path):
    student = load_student(distil(tmp_path))
    assert student.encoder_timestep == 751 and student.schedules == {4: [751, 501, 251, 1]}
    assert student.provenance["history"][-1]["distilled"]["iterations"] == 4
    assert (tmp_path / "samples/step-000004.png").exists()
    assert list((tmp_path / "tensorboard").glob("events*"))
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert {"vsd", "kl", "fake", "student_grad", "fake_grad"} < rows[0].keys()
    before = tiny.emoji().unet.state_dict()
    moved = [name for name, tensor in student.components.unet.state_dict().items() if (tensor != before[name]).any()]
    assert len(moved) == len(before)


def test_the_first_fake_score_is_the_teacher_so_vsd_has_no_gradient_yet(tmp_path):
    run = Distillation(tiny.emoji(), PROMPTS, tmp_path, dataclasses.replace(CONFIG, iterations=1, kl_weight=0.0))
    values = run._update(0)
    assert values["vsd"] == 0.0 and values["student_grad"] == 0.0 and values["fake_grad"] > 0.0


@pytest.mark.parametrize("fake_score", ["lora", "full"])
def test_the_fake_score_learns_and_the_teacher_does_not(tmp_path, fake_score):
    components = tiny.emoji()
    original = {name: tensor.clone() for name, tensor in components.unet.state_dict().items()}
    config = dataclasses.replace(CONFIG, fake_score=fake_score, fake_steps=3)
    run = Distillation(components, PROMPTS, tmp_path, config)
    trained = [p.detach().clone() for p in run.scores.parameters()]
    run._update(0)
    assert any((new != old).any() for new, old in zip(run.scores.parameters(), trained, strict=True))
    z, t, text = torch.randn(1, 16, 8, 8), torch.tensor([500]), run._encode(["a cat"])
    reference = tiny.emoji().unet(z, t, text).sample
    torch.testing.assert_close(run.scores.teacher(z, t, text, text, 1.0), reference, atol=REORDERED, rtol=0)
    now = {name.replace("base_layer.", ""): p for name, p in components.unet.state_dict().items() if "lora" not in name}
    assert all(torch.equal(now[name], tensor) for name, tensor in original.items())


def test_guidance_extrapolates_from_the_null_text(tmp_path):
    run = Distillation(tiny.emoji(), PROMPTS, tmp_path, CONFIG)
    z, t, text, null = (
        torch.randn(2, 16, 8, 8),
        torch.tensor([3, 700]),
        run._encode(["a", "b"]),
        run._encode([""]),
    )
    unet = tiny.emoji().unet
    conditional, unconditional = unet(z, t, text).sample, unet(z, t, null.expand_as(text)).sample
    expected = unconditional + 4.5 * (conditional - unconditional)
    torch.testing.assert_close(run.scores.teacher(z, t, text, null, 4.5), expected, atol=1e-4, rtol=1e-4)


def test_v_prediction_is_judged_as_noise(tmp_path):
    """The maps that KL sees are eps along the DDIM path: z_0 is rebuilt from them with the weights for epsilon."""
    components = tiny.v_prediction()
    run = Distillation(components, PROMPTS, tmp_path, CONFIG)
    noise, text = torch.randn(2, 4, 8, 8), run._encode(["a", "b"])
    z0, v = run.tiue.predict(noise, text)
    maps = run._eps_maps(noise, v)
    epsilon = closed_form(components.scheduler_config | {"prediction_type": "epsilon"}, 4)
    rebuilt = epsilon.noise_weight * noise + sum(w * e for w, e in zip(epsilon.step_weights, maps, strict=True))
    torch.testing.assert_close(rebuilt, z0, atol=1e-4, rtol=1e-4)
    assert not torch.equal(maps, v) and kl_loss(maps).isfinite()


def test_accumulated_micro_batches_count_as_one_batch(tmp_path):
    run = Distillation(tiny.emoji(), PROMPTS, tmp_path, dataclasses.replace(CONFIG, accumulate=3, kl_weight=1.0))
    kl = []
    for micro in range(3):
        draw = Draw(CONFIG.seed, 0, micro, 0, torch.device("cpu"))
        kl.append(run._student_losses(run._encode(run._batch(0, micro)), draw)[2].item())
    assert run._update(0)["kl"] == pytest.approx(sum(kl) / 3, rel=1e-5)
    assert [run._batch(0, m) for m in range(3)] == [[run.prompts[2 * m + i] for i in range(2)] for m in range(3)]


def test_draws_differ_between_steps_micro_batches_and_processes():
    keys = list(itertools.product((0, 1), repeat=4))
    first = {key: tuple(Draw(*key, torch.device("cpu")).normal((4,)).tolist()) for key in keys}
    assert len(set(first.values())) == len(keys)


def test_resumed_after_sigkill_equals_uninterrupted(tmp_path, teacher_directory, prompts_file):
    """A process is killed between two checkpoints; the same command then reaches the same weights, bit for bit."""
    flags = ["--teacher", str(teacher_directory), "--prompts", str(prompts_file), "--iterations", "8"]
    flags += ["--batch-size", "2", "--learning-rate", "1e-4", "--lora-rank", "2", "--checkpoint-every", "2"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0

    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "tiue", *flags, "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = killed / "losses.csv"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= 4) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "student.safetensors").exists()
    assert list((killed / "checkpoints").glob("step-*.pt"))

    assert main([*flags, "--out", str(killed)]) == 0
    whole, resumed = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def without_time(name):
        return [row.rsplit(",", 1)[0] for row in (tmp_path / name / "losses.csv").read_text().splitlines()]

    assert without_time("whole") == without_time("killed")


def test_a_run_is_not_resumed_with_other_settings(tmp_path):
    distil(tmp_path, iterations=2)
    with pytest.raises(ValueError, match=r"another configuration: learning_rate 0\.0001 -> 0\.1"):
        distil(tmp_path, learning_rate=0.1)


def changed(components):
    """Other weights of the UNet, in one layer."""
    with torch.no_grad():
        components.unet.conv_out.bias += 1.0
    return components


@pytest.mark.parametrize("name", ["teacher", "prompts", "init"])
def test_a_run_is_not_resumed_with_another(tmp_path, name):
    distil(tmp_path, iterations=1)
    given = {
        "teacher": changed(tiny.emoji()) if name == "teacher" else tiny.emoji(),
        "prompts": PROMPTS[::-1] if name == "prompts" else PROMPTS,
        "initial": Student(tiny.emoji(), 751, {4: [751, 501, 251, 1]}) if name == "init" else None,
    }
    with pytest.raises(ValueError, match=rf"another configuration: {name} \S+ -> '[0-9a-f]{{16}}'$"):
        Distillation(**given, out=tmp_path, config=CONFIG)


def test_a_mistake_leaves_no_run_behind(tmp_path):
    initial = Student(tiny.emoji(), 501, {2: [501, 1]})
    with pytest.raises(ValueError, match="this run needs"):
        Distillation(tiny.emoji(), PROMPTS, tmp_path, CONFIG, initial=initial)
    assert not list(tmp_path.iterdir())


def test_one_process_writes_the_configuration_and_all_compare(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    Distillation(tiny.emoji(), PROMPTS, tmp_path, CONFIG)
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(ValueError, match="seed 1 -> 0"):
        Distillation(tiny.emoji(), PROMPTS, tmp_path, CONFIG)


def test_two_processes_make_one_run(tmp_path, teacher_directory, prompts_file, capsys):
    flags = ["--teacher", str(teacher_directory), "--prompts", str(prompts_file), "--out", str(tmp_path)]
    flags += ["--iterations", "2", "--batch-size", "1", "--lora-rank", "2", "--accumulate", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    # As `accelerate launch --cpu` starts them.
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tiue", *flags],
            env=os.environ | address | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert load_student(tmp_path / "student.safetensors").provenance["history"]
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 3
    assert main(flags) == 2
    assert "another configuration: processes 2 -> 1" in capsys.readouterr().err


class LossScaled(Accelerator):
    """What fp16 is on a GPU: losses are scaled, here by far too much, and steps that overflow are skipped."""

    mixed_precision = "fp16"

    def __init__(self, **options):
        super().__init__(**options)
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-30)


def test_an_overflow_skips_the_update_and_its_average(tmp_path, monkeypatch):
    monkeypatch.setattr("tiue.distill.Accelerator", LossScaled)
    config = dataclasses.replace(CONFIG, iterations=2, kl_weight=1e3)
    run = Distillation(tiny.emoji(), PROMPTS, tmp_path, config)
    run.run(progress=False)
    rows = list(csv.DictReader((tmp_path / "losses.csv").read_text().splitlines()))
    assert [row["student_grad"] in ("inf", "nan") for row in rows] == [True, False]
    assert run.ema.optimization_step == 1
    assert run.accelerator.scaler.get_scale() == pytest.approx(1e8)

    resumed = Distillation(tiny.emoji(), PROMPTS, tmp_path, config)
    resumed.run(progress=False)
    assert resumed.accelerator.scaler.get_scale() == pytest.approx(1e8)


def test_a_run_from_before_its_loss_scale_was_kept_goes_on(tmp_path, monkeypatch):
    distil(tmp_path, iterations=2)
    monkeypatch.setattr("tiue.distill.Accelerator", LossScaled)
    distil(tmp_path, iterations=3)


def test_divergence_is_one_line_and_exit_1(tmp_path, teacher_directory, prompts_file, capsys):
    flags = ["--teacher", str(teacher_directory), "--prompts", str(prompts_file), "--out", str(tmp_path)]
    assert main([*flags, "--batch-size", "1", "--lora-rank", "2", "--learning-rate", "1e30"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m tiue: error: step 2: a loss or a gradient is not finite: vsd nan, kl nan")
    assert not (tmp_path / "student.safetensors").exists()


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(arguments, config):
        raise KeyboardInterrupt

    monkeypatch.setattr("tiue.cli._distill", interrupted)
    assert main(["--teacher", "t", "--prompts", "p.txt", "--out", "o"]) == 2
    assert capsys.readouterr().err == "python -m tiue: error: interrupted\n"


def test_a_run_begins_from_an_initial_student(tmp_path):
    components = dataclasses.replace(changed(tiny.emoji()), name="started")
    initial = Student(components, 751, {4: [751, 501, 251, 1]}, provenance={"history": ["warm"]})
    run = Distillation(tiny.emoji(), PROMPTS, tmp_path, CONFIG, initial=initial)
    assert torch.equal(run.tiue.unet.conv_out.bias, components.unet.conv_out.bias)
    assert run._finished().provenance["history"][0] == "warm"
    assert run._finished().components.name == "started"


def test_a_student_with_a_shared_up_block(tmp_path):
    student = load_student(distil(tmp_path, iterations=1, shared_up_blocks=1))
    assert student.shared_up_blocks == student.tiue().shared_up_blocks == 1


def test_a_run_from_before_a_setting_goes_on_with_its_default(tmp_path):
    distil(tmp_path, iterations=2)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("shared_up_blocks", "teacher", "prompts", "init", "processes"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="another configuration: shared_up_blocks 0 -> 1"):
        distil(tmp_path, iterations=4, shared_up_blocks=1)
    distil(tmp_path, iterations=4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shared-up-blocks", "2"], "shared_up_blocks: expected 0 to 1 for a UNet of 2 up blocks, got 2"),
        (["--teacher", "{tmp}/none"], "no such pipeline directory"),
        (["--prompts", "{tmp}/none.txt"], "none.txt: No such file"),
        (["--batch-size", "0"], "batch_size must be positive"),
        (["--learning-rate", "nan"], "learning_rate must be positive"),
        (["--init", "{tmp}/none.safetensors"], "no such checkpoint"),
        (["--preset", "{tmp}/none.json"], "none.json: No such file"),
        (["--out", f"{__file__}/out"], "Not a directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, teacher_directory, prompts_file, capsys, flags, message):
    given = {
        "--teacher": str(teacher_directory),
        "--prompts": str(prompts_file),
        "--out": str(tmp_path / "out"),
    }
    given |= dict([[flag.format(tmp=tmp_path) for flag in flags]])
    assert main([word for pair in given.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_dry_run_prints_settings_of_preset_and_flags(tmp_path, teacher_directory, prompts_file, capsys):
    (tmp_path / "p.json").write_text('{"batch_size": 3, "guidance": 2.5}')
    flags = [
        "--teacher",
        str(teacher_directory),
        "--prompts",
        str(prompts_file),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*flags, "--preset", str(tmp_path / "p.json"), "--guidance", "1.5", "--dry-run"]) == 0
    settings = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert settings["batch_size"] == "3" and settings["guidance"] == "1.5" and settings["steps"] == "4"
    assert not (tmp_path / "out").exists()
