import copy
import csv
import dataclasses
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image, ImageChops
from processes import launched, start
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tolerances import ALMOST_ZERO, AMPLIFIED, CUT_LOSSES, EMBEDDINGS, REORDERED, SHARED_LOSSES, SHARED_WEIGHTS
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from tiue.checkpoint import CheckpointError, Student, load_student
from tiue.distill import runs
from tiue.distill.average import Average
from tiue.distill.cli import main
from tiue.distill.clip import ClipScore, load_clip
from tiue.distill.command import status_of
from tiue.distill.config import DistillConfig
from tiue.distill.draws import Draws, SharedDraws
from tiue.distill.errors import DivergedError, StoppedError
from tiue.distill.loop import train
from tiue.distill.vsd import Vsd, prepare
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


def made(out: Path, components=None, **changes) -> Vsd:
    """A distillation that is ready and not trained."""
    return prepare(components or tiny.emoji(), PROMPTS, out, dataclasses.replace(CONFIG, **changes))[1]


def distill(out: Path, components=None, **changes) -> Path:
    config = dataclasses.replace(CONFIG, **changes)
    return train(*prepare(components or tiny.emoji(), PROMPTS, out, config), progress=False)


def updated(out: Path, steps: int = 1, **changes) -> list[dict[str, float]]:
    """What a method returns from its first updates, and the norms of its gradients."""
    run, method = prepare(tiny.emoji(), PROMPTS, out, dataclasses.replace(CONFIG, **changes))
    found = []
    for step in range(steps):
        values = method.update(step, run.batch(step))
        norms = {f"{name}_grad": network.grad_norm for name, network in method.networks.items()}
        found.append({name: float(value) for name, value in (values | norms).items()})
    return found


def test_a_run_writes_a_student_with_everything_beside_it(tmp_path):
    student = load_student(distill(tmp_path))
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
    (values,) = updated(tmp_path, iterations=1, kl_weight=0.0)
    assert values["vsd"] == 0.0 and values["student_grad"] == 0.0 and values["fake_grad"] > 0.0


@pytest.mark.parametrize("fake_score", ["lora", "full"])
def test_the_fake_score_learns_and_the_teacher_does_not(tmp_path, fake_score):
    components = tiny.emoji()
    original = {name: tensor.clone() for name, tensor in components.unet.state_dict().items()}
    config = dataclasses.replace(CONFIG, fake_score=fake_score, fake_steps=3)
    run, method = prepare(components, PROMPTS, tmp_path, config)
    trained = [p.detach().clone() for p in method.fake.parameters]
    method.update(0, run.batch(0))
    assert any((new != old).any() for new, old in zip(method.fake.parameters, trained, strict=True))
    z, t, text = torch.randn(1, 16, 8, 8), torch.tensor([500]), method.captions.encode(["a cat"])
    reference = tiny.emoji().unet(z, t, text).sample
    torch.testing.assert_close(method.scores.teacher(z, t, text, text, 1.0), reference, atol=REORDERED, rtol=0)
    now = {name.replace("base_layer.", ""): p for name, p in components.unet.state_dict().items() if "lora" not in name}
    assert all(torch.equal(now[name], tensor) for name, tensor in original.items())


def test_guidance_extrapolates_from_the_null_text(tmp_path):
    method = made(tmp_path)
    z, t, text, null = (
        torch.randn(2, 16, 8, 8),
        torch.tensor([3, 700]),
        method.captions.encode(["a", "b"]),
        method.captions.encode([""]),
    )
    unet = tiny.emoji().unet
    conditional, unconditional = unet(z, t, text).sample, unet(z, t, null.expand_as(text)).sample
    expected = unconditional + 4.5 * (conditional - unconditional)
    torch.testing.assert_close(method.scores.teacher(z, t, text, null, 4.5), expected, atol=AMPLIFIED, rtol=AMPLIFIED)


def test_v_prediction_is_judged_as_noise(tmp_path):
    """The maps that KL sees are eps along the DDIM path: z_0 is rebuilt from them with the weights for epsilon."""
    components = tiny.v_prediction()
    method = made(tmp_path, components)
    noise, text = torch.randn(2, 4, 8, 8), method.captions.encode(["a", "b"])
    z0, v = method.tiue.predict(noise, text)
    maps = method.noise_maps(noise, v, method.schedules[4])
    epsilon = closed_form(components.scheduler_config | {"prediction_type": "epsilon"}, 4)
    rebuilt = epsilon.noise_weight * noise + sum(w * e for w, e in zip(epsilon.step_weights, maps, strict=True))
    torch.testing.assert_close(rebuilt, z0, atol=AMPLIFIED, rtol=AMPLIFIED)
    assert not torch.equal(maps, v) and kl_loss(maps).isfinite()


@pytest.mark.parametrize(("batch_size", "accumulate"), [(3, 1), (1, 3)])
def test_micro_batches_are_one_batch(tmp_path, batch_size, accumulate):
    """Samples, their numbers and the text of each, whatever they are cut into; so are the losses."""
    changes = {"learning_rate": 1e-9, "fake_learning_rate": 1e-9, "iterations": 3}
    values = updated(tmp_path / "cut", 2, batch_size=batch_size, accumulate=accumulate, **changes)
    expected = updated(tmp_path / "whole", 2, batch_size=3, **changes)
    for cut, one in zip(values, expected, strict=True):
        assert cut == pytest.approx(one, rel=CUT_LOSSES, abs=ALMOST_ZERO)


def test_draws_depend_on_seed_step_and_sample_alone():
    device = torch.device("cpu")
    keys = list(itertools.product((0, 1), repeat=3))
    first = {key: tuple(Draws(*key, 1, device).normal((4,))[0].tolist()) for key in keys}
    assert len(set(first.values())) == len(keys)
    both, second = Draws(0, 0, 0, 2, device), Draws(0, 0, 1, 1, device)
    assert torch.equal(both.normal((4,))[1:], second.normal((4,)))
    assert torch.equal(both.integers(0, 1000)[1:], second.integers(0, 1000))
    assert SharedDraws(0, 0).uniform() == SharedDraws(0, 0).uniform() != SharedDraws(0, 1).uniform()
    assert {SharedDraws(0, step).choice((4, 2, 1)) for step in range(20)} == {4, 2, 1}


def test_resumed_after_sigkill_equals_uninterrupted(tmp_path, teacher_directory, prompts_file):
    """A process is killed between two checkpoints; the same command then reaches the same weights, bit for bit."""
    flags = ["--teacher", str(teacher_directory), "--prompts", str(prompts_file), "--iterations", "8"]
    flags += ["--batch-size", "2", "--learning-rate", "1e-4", "--lora-rank", "2", "--checkpoint-every", "2"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0

    killed = tmp_path / "killed"
    process = start(["-m", "tiue", *flags, "--out", str(killed)], tmp_path / "printed")
    log = killed / "losses.csv"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= 4) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (killed / "student.safetensors").exists()
    assert list((killed / "checkpoints").glob("step-*.pt"))

    assert main([*flags, "--out", str(killed)]) == 0
    whole, resumed = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def without_time(name):
        return [row.rsplit(",", 2)[0] for row in (tmp_path / name / "losses.csv").read_text().splitlines()]

    assert without_time("whole") == without_time("killed")


def test_a_run_is_not_resumed_with_other_settings(tmp_path):
    distill(tmp_path, iterations=2)
    with pytest.raises(ValueError, match=r"another configuration: learning_rate 0\.0001 -> 0\.1"):
        distill(tmp_path, learning_rate=0.1)


def changed(components):
    """Other weights of the UNet, in one layer."""
    with torch.no_grad():
        components.unet.conv_out.bias += 1.0
    return components


@pytest.mark.parametrize("name", ["teacher", "noise_process", "prompts", "init", "clip"])
def test_a_run_is_not_resumed_with_another(tmp_path, name, clip):
    config, used = CONFIG, None
    if name == "clip":
        config, used = dataclasses.replace(CONFIG, clip_weight=0.1), clip
    run, _ = prepare(tiny.emoji(), PROMPTS, tmp_path, config, clip=used)
    runs.record_run(tmp_path, config, run.identity | ({} if used is None else {"clip": "0" * 16}))
    teacher = changed(tiny.emoji()) if name == "teacher" else tiny.emoji()
    if name == "noise_process":
        of_v = teacher.scheduler_config | {"prediction_type": "v_prediction"}
        teacher = dataclasses.replace(teacher, scheduler_config=of_v)
    given = {
        "teacher": teacher,
        "prompts": PROMPTS[::-1] if name == "prompts" else PROMPTS,
        "initial": Student(tiny.emoji(), 751, {4: [751, 501, 251, 1]}) if name == "init" else None,
        "clip": used,
    }
    with pytest.raises(ValueError, match=rf"another configuration: {name} \S+ -> '[0-9a-f]{{16}}'$"):
        prepare(**given, out=tmp_path, config=config)


def test_a_mistake_leaves_no_run_behind(tmp_path):
    of_v = tiny.emoji().scheduler_config | {"prediction_type": "v_prediction"}
    for initial, message in (
        (Student(tiny.emoji(), 501, {2: [501, 1]}), "this run needs"),
        (
            Student(dataclasses.replace(tiny.emoji(), scheduler_config=of_v), 751, {4: [751, 501, 251, 1]}),
            r"the initial student learned v_prediction .*; the teacher has epsilon",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(tiny.emoji(), PROMPTS, tmp_path, CONFIG, initial=initial)
    assert not list(tmp_path.iterdir())


def test_one_process_writes_the_configuration_and_all_compare(tmp_path, monkeypatch):
    distill(tmp_path, iterations=1)
    (tmp_path / "config.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "is_main_process", False)
        distill(tmp_path, iterations=1)
    assert not (tmp_path / "config.json").exists()
    (tmp_path / "config.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(ValueError, match="seed 1 -> 0"):
        made(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    distill(tmp_path, iterations=2)
    (path,) = runs.checkpoints(tmp_path)
    torch.save({"step": 2, "student": {}}, path)
    with pytest.raises(ValueError, match=r"step-00000002\.pt was written by another version of the trainer: resume"):
        distill(tmp_path, iterations=4)


@pytest.mark.parametrize("named", ["name", "conv_out"])
def test_a_student_that_cannot_be_saved_is_refused_before_the_first_update(tmp_path, named):
    components = tiny.emoji()
    if named == "name":
        components = dataclasses.replace(components, name="two\nlines")
    else:
        with torch.no_grad():
            components.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=named):
        made(tmp_path, components)
    assert not list(tmp_path.iterdir())


def logged(out: Path) -> list[dict[str, float]]:
    with (out / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{n: float(v) for n, v in row.items() if v and n not in ("seconds", "samples_per_second")} for row in rows]


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory, teacher_directory, prompts_file) -> tuple[list[str], Path]:
    """Flags, and what one process makes with them and a batch of 2."""
    out = tmp_path_factory.mktemp("one")
    flags = ["--teacher", str(teacher_directory), "--prompts", str(prompts_file), "--learning-rate", "1e-5"]
    flags += ["--iterations", "4", "--lora-rank", "2", "--accumulate", "2", "--sample-every", "4"]
    flags += ["--checkpoint-every", "2"]
    assert main([*flags, "--batch-size", "2", "--out", str(out)]) == 0
    return flags, out


@pytest.mark.parametrize(
    ("kind", "version", "environment", "changes", "message"),
    [
        ("DEEPSPEED", 1, {}, {}, "configured for DEEPSPEED; a run is shared by DDP or FSDP 2"),
        ("FSDP", 1, {}, {}, "configured for FSDP 1; set fsdp_version: 2"),
        ("FSDP", 2, {}, {"optimizer": "adam8bit"}, "`optimizer` adam8bit does not work with FSDP"),
        (
            "MULTI_GPU",
            1,
            {"GRADIENT_ACCUMULATION_STEPS": "4"},
            {},
            "configured to accumulate 4 gradients; set `accumulate` instead",
        ),
        ("MULTI_GPU", 1, {"MIXED_PRECISION": "bf16"}, {}, "mixed precision in bf16; set `mixed_precision` instead"),
    ],
)
def test_what_accelerate_can_and_a_run_cannot_is_refused(
    tmp_path, monkeypatch, kind, version, environment, changes, message
):
    class Launched(Accelerator):
        distributed_type = DistributedType(kind)
        is_fsdp2 = version == 2

    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setattr("tiue.distill.method.Accelerator", Launched)
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [["-m", "tiue"], [str(Path(__file__).parent / "sharded.py")]], ids=["DDP", "FSDP"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, by_one_process, program):
    """Stopped at the checkpoint of step 2 and begun again."""
    flags, one = by_one_process
    flags = [*flags, "--batch-size", "1", "--out", str(tmp_path)]
    launched(program, [*flags, "--iterations", "2"], 2)
    launched(program, flags, 2)
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for apart, together in zip(rows, logged(one), strict=True):
        assert apart == pytest.approx(together, rel=SHARED_LOSSES, abs=ALMOST_ZERO)
    students = [load_file(out / "student.safetensors") for out in (tmp_path, one)]
    for name, tensor in students[0].items():
        torch.testing.assert_close(tensor, students[1][name], atol=SHARED_WEIGHTS, rtol=0)
    grids = [Image.open(out / "samples/step-000004.png") for out in (tmp_path, one)]
    assert max(most for _, most in ImageChops.difference(*grids).getextrema()) <= 1  # of 255 levels


def test_a_run_of_two_processes_is_not_resumed_by_one(tmp_path, teacher_directory, prompts_file, capsys):
    flags = ["--teacher", str(teacher_directory), "--prompts", str(prompts_file), "--out", str(tmp_path)]
    tmp_path.joinpath("config.json").write_text(json.dumps({"processes": 2}))
    assert main(flags) == 2
    assert "another configuration: processes 2 -> 1" in capsys.readouterr().err


def test_processes_that_see_other_checkpoints_do_not_go_on(tmp_path, monkeypatch):
    distill(tmp_path, iterations=2)
    monkeypatch.setattr(Accelerator, "gather", lambda self, step: torch.cat([step, step - 2]))
    with pytest.raises(ValueError, match=r"different steps \[2, 0\]: do all of them see"):
        distill(tmp_path, iterations=4)


def test_tensorboard_has_every_step_once(tmp_path):
    distill(tmp_path, iterations=3)
    distill(tmp_path, iterations=4)  # from the checkpoint of step 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = list(csv.DictReader((tmp_path / "losses.csv").read_text().splitlines()))
    assert [(event.step, f"{event.value:.6g}") for event in events.Scalars("kl")] == [
        (int(row["step"]), row["kl"]) for row in rows
    ]
    assert len(rows) == 4


class LossScaled(Accelerator):
    """What fp16 is on a GPU: losses are scaled, here by far too much, and steps that overflow are skipped."""

    mixed_precision = "fp16"

    def __init__(self, **options):
        super().__init__(**options)
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-30)


def test_an_overflow_skips_the_update_and_its_average(tmp_path, monkeypatch):
    averages = []

    class Watched(Average):
        def __init__(self, *given):
            super().__init__(*given)
            averages.append(self)

    monkeypatch.setattr("tiue.distill.method.Accelerator", LossScaled)
    monkeypatch.setattr("tiue.distill.loop.Average", Watched)
    config = dataclasses.replace(CONFIG, iterations=2, kl_weight=1e3)
    run, method = prepare(tiny.emoji(), PROMPTS, tmp_path, config)
    train(run, method, progress=False)
    rows = list(csv.DictReader((tmp_path / "losses.csv").read_text().splitlines()))
    assert [row["student_grad"] in ("inf", "nan") for row in rows] == [True, False]
    assert averages[0].updates == 1
    assert run.accelerator.scaler.get_scale() == pytest.approx(1e8)

    resumed, method = prepare(tiny.emoji(), PROMPTS, tmp_path, config)
    train(resumed, method, progress=False)
    assert resumed.accelerator.scaler.get_scale() == pytest.approx(1e8)


def test_divergence_is_one_line_and_exit_1(tmp_path, teacher_directory, prompts_file, capsys):
    flags = ["--teacher", str(teacher_directory), "--prompts", str(prompts_file), "--out", str(tmp_path)]
    flags += ["--batch-size", "1", "--lora-rank", "2", "--learning-rate", "1e30", "--checkpoint-every", "1"]
    assert main(flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m tiue: error: step 2: a loss or a gradient is not finite: vsd nan, kl nan")
    assert f"the last checkpoint is {tmp_path / 'checkpoints/step-00000001.pt'}; prompts: " in error
    assert any(error.endswith(f"prompts: {prompt!r}") for prompt in PROMPTS)
    assert not (tmp_path / "student.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_by_a_checkpoint(tmp_path, monkeypatch, number):
    """At the third of eight steps; begun again, the run ends as if it had not been stopped."""
    update = Vsd.update

    def interrupted(self, step, batch):
        if step == 2:
            os.kill(os.getpid(), number)
        return update(self, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Vsd, "update", interrupted)
        with pytest.raises(StoppedError, match=rf"stopped by {number.name} after step 3, saved at step 3") as stopped:
            distill(tmp_path / "stopped", iterations=5, checkpoint_every=100)
    assert stopped.value.signal == number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = load_file(distill(tmp_path / "stopped", iterations=5, checkpoint_every=100))
    whole = load_file(distill(tmp_path / "whole", iterations=5, checkpoint_every=100))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_the_command_ends_with_the_number_of_the_signal(tmp_path, teacher_directory, prompts_file, capsys, monkeypatch):
    def stopped(run, method):
        raise StoppedError("stopped by SIGTERM after step 3", signal.SIGTERM)

    monkeypatch.setattr("tiue.distill.loop.train", stopped)
    flags = ["--teacher", str(teacher_directory), "--prompts", str(prompts_file), "--out", str(tmp_path)]
    assert main([*flags, "--lora-rank", "2"]) == 143
    assert capsys.readouterr().err.endswith("python -m tiue: error: stopped by SIGTERM after step 3\n")


def test_the_same_seed_gives_the_same_weights(tmp_path):
    first, second = (load_file(distill(tmp_path / name, iterations=2)) for name in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 0.0),
        ({"ema_on_cpu": True}, 0.0),
        ({"text_cache": False}, EMBEDDINGS),
        ({"channels_last": True}, REORDERED),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_saves_time_or_memory_changes_nothing(tmp_path, changes, tolerance):
    plain, other = (load_file(distill(tmp_path / str(len(c)), iterations=2, **c)) for c in ({}, changes))
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, atol=tolerance, rtol=0)


def test_the_average_follows_every_k_steps(tmp_path):
    distill(tmp_path, iterations=5, ema_every=2)
    (*_, path) = runs.checkpoints(tmp_path)
    average = torch.load(path, weights_only=True)["state"]["average"]
    assert average["optimization_step"] == 2 and average["decay"] == pytest.approx(0.999**2)


def test_without_an_average_the_last_weights_are_left(tmp_path):
    run, method = prepare(tiny.emoji(), PROMPTS, tmp_path, dataclasses.replace(CONFIG, ema_decay=0.0))
    saved = load_file(train(run, method, progress=False))
    assert all(torch.equal(saved[f"unet.{name}"], p) for name, p in method.model.named_parameters())


def test_learning_rates_fall_to_zero_when_asked(tmp_path):
    distill(tmp_path, learning_rate_decay="linear")
    rates = [(row["student_lr"], row["fake_lr"]) for row in logged(tmp_path)]
    assert rates == [pytest.approx((1e-4 * f, 1e-3 * f)) for f in (1.0, 0.75, 0.5, 0.25)]
    with pytest.raises(ValueError, match="iterations 4 -> 8"):
        made(tmp_path, learning_rate_decay="linear", iterations=8)


def test_one_student_for_several_step_counts(tmp_path):
    out = distill(tmp_path, iterations=8, steps=(4, 2, 1))
    student = load_student(out)
    assert student.schedules == {4: [751, 501, 251, 1], 2: [501, 1], 1: [1]} and student.encoder_timestep == 751
    drawn = [len([name for name in row if name.startswith("mu_")]) for row in logged(tmp_path)]
    assert set(drawn) == {4, 2, 1}


def test_the_control_does_not_share_its_encoder(tmp_path):
    config = dataclasses.replace(CONFIG, share_encoder=False, iterations=1, sample_every=1)
    run, method = prepare(tiny.emoji(), PROMPTS, tmp_path, config)
    noise, text = torch.randn(2, 16, 8, 8), method.captions.encode(["a", "b"])
    _, eps = method.predict(noise, text, method.schedules[4])
    unet = tiny.emoji().unet
    for i, t in enumerate(method.schedules[4].timesteps):
        torch.testing.assert_close(eps[i], unet(noise, t, text).sample, atol=REORDERED, rtol=0)
    student = load_student(train(run, method, progress=False))
    assert not student.share_encoder
    with pytest.raises(ValueError, match="a control without a shared encoder: it cannot be split"):
        student.tiue()


@pytest.fixture(scope="module")
def clip() -> ClipScore:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = vision | {"vocab_size": 400, "max_position_embeddings": 16, "eos_token_id": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return ClipScore(model, tiny.emoji().tokenizer, tiny.taesd(latent_channels=16))


def test_the_clip_loss_reaches_the_student_and_falls_to_nothing(tmp_path, clip):
    config = dataclasses.replace(CONFIG, clip_weight=0.1, iterations=4, kl_weight=0.0)
    run, method = prepare(tiny.emoji(), PROMPTS, tmp_path, config, clip=clip)
    assert [method.clip_weight(step) for step in (0, 2, 4)] == pytest.approx([0.1, 0.05, 0.0])
    values = method.update(0, run.batch(0))
    assert values["clip"] > 0.0 and method.student.grad_norm > 0.0  # VSD has no gradient yet
    train(run, method, progress=False)
    assert {"clip"} < logged(tmp_path)[-1].keys()


def test_the_clip_loss_and_its_weight_need_each_other(tmp_path, clip):
    for weight, given, found in ((0.1, None, "0.1 without"), (0.0, clip, "0 with")):
        config = dataclasses.replace(CONFIG, clip_weight=weight)
        with pytest.raises(ValueError, match=rf"`clip_weight` {found} a CLIP loss: expected both or neither"):
            prepare(tiny.emoji(), PROMPTS, tmp_path, config, clip=given)


def test_clip_is_loaded_whole_and_in_float32(tmp_path, clip):
    tiny.taesd(latent_channels=16).save_pretrained(tmp_path / "vae")
    model = copy.deepcopy(clip._model).half()
    model.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="holds no tokenizer of CLIP"):
        load_clip(tmp_path / "clip", tmp_path / "vae")
    (tmp_path / "clip/vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}')
    (tmp_path / "clip/merges.txt").write_text("#version: 0.2\n")
    loaded = load_clip(tmp_path / "clip", tmp_path / "vae")
    assert loaded.loss(torch.zeros(1, 16, 8, 8), ["a"]).dtype == torch.float32
    CLIPTextModel(model.config.text_config).save_pretrained(tmp_path / "clip")  # as in a pipeline
    with pytest.raises(ValueError, match="lacks tensor logit_scale"):
        load_clip(tmp_path / "clip", tmp_path / "vae")


def test_a_text_encoder_that_does_not_fit_is_refused(tmp_path):
    components = tiny.with_unet(tiny.unet(cross_attention_dim=24))
    with pytest.raises(ValueError, match=r"embeddings of 24 .* makes 16"):
        made(tmp_path, components)
    assert not list(tmp_path.iterdir())


def test_long_and_repeated_prompts_are_reported(tmp_path, caplog):
    caplog.set_level("INFO", "tiue")
    prepare(tiny.emoji(), [*PROMPTS, "x", "x " * 99], tmp_path, CONFIG)
    assert "6 prompts, without 1 repetitions" in caplog.text
    assert "1 of 6 prompts are longer than" in caplog.text


def test_a_report_ends_the_run(tmp_path):
    distill(tmp_path, iterations=4)
    text = (tmp_path / "report.md").read_text()
    assert "4 updates" in text and "| mu_751 |" in text and "samples/step-000004.png" in text
    with Image.open(tmp_path / "losses.png") as plot:
        assert plot.size == (1300, 700)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("`keep` is wrong"), 2, "--keep is wrong"),
        (OSError("x"), 2, "x"),
        (OSError(), 2, "OSError"),
        (DivergedError("x"), 1, "x"),
        (StoppedError("x", 15), 143, "x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_command_ends_with_a_status_and_one_line(error, status, said, capsys):
    def fails():
        raise error

    assert status_of("program", fails, DistillConfig) == status and status_of("program", lambda: None) == 0
    assert capsys.readouterr().err == f"program: error: {said}\n"


def test_a_short_run_that_draws_few_numbers_of_steps_has_a_report(tmp_path):
    distill(tmp_path, iterations=1, steps=(4, 2, 1), seed=1)
    (drawn,) = logged(tmp_path)
    missing = {"mu_751", "mu_501", "mu_251", "mu_1"} - drawn.keys()
    text = (tmp_path / "report.md").read_text()
    assert missing and not any(name in text for name in missing) and (tmp_path / "losses.png").exists()


def test_fewer_updates_than_there_are_is_refused(tmp_path):
    distill(tmp_path, iterations=2)
    with pytest.raises(ValueError, match="holds 2 updates already, and `iterations` is 1"):
        distill(tmp_path, iterations=1)
    assert json.loads((tmp_path / "config.json").read_text())["iterations"] == 2


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(directory):
        raise KeyboardInterrupt

    monkeypatch.setattr("tiue.components.load_components", interrupted)
    assert main(["--teacher", "t", "--prompts", "p.txt", "--out", "o"]) == 130
    assert capsys.readouterr().err == "python -m tiue: error: interrupted\n"


def test_a_run_begins_from_an_initial_student(tmp_path):
    components = dataclasses.replace(changed(tiny.emoji()), name="started")
    initial = Student(components, 751, {4: [751, 501, 251, 1]}, provenance={"history": "warm"})
    _, method = prepare(tiny.emoji(), PROMPTS, tmp_path, CONFIG, initial=initial)
    assert torch.equal(method.model.conv_out.bias, components.unet.conv_out.bias)
    finished = method.finished(method.model.state_dict())
    assert finished.provenance["history"][0] == "warm" and finished.components.name == "started"


def test_a_student_with_a_shared_up_block(tmp_path):
    student = load_student(distill(tmp_path, iterations=1, shared_up_blocks=1))
    assert student.shared_up_blocks == student.tiue().shared_up_blocks == 1


def test_a_run_from_before_a_setting_goes_on_with_its_default(tmp_path):
    distill(tmp_path, iterations=2)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("shared_up_blocks", "teacher", "noise_process", "prompts", "init", "clip", "processes"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="another configuration: shared_up_blocks 0 -> 1"):
        distill(tmp_path, iterations=4, shared_up_blocks=1)
    distill(tmp_path, iterations=4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shared-up-blocks", "2"], "shared_up_blocks: expected 0 to 1 for a UNet of 2 up blocks, got 2"),
        (["--teacher", "{tmp}/none"], "no such pipeline directory"),
        (["--prompts", "{tmp}/none.txt"], "none.txt: No such file"),
        (["--batch-size", "0"], "--batch-size must be a whole number of at least 1, got 0"),
        (["--learning-rate", "nan"], "--learning-rate must be a number above 0, got nan"),
        (["--ema-decay", "1.5"], "--ema-decay must be a number of at least 0 and at most 1, got 1.5"),
        (["--clip", "x"], "--clip-weight, --clip and --tiny-vae need each other"),
        (["--clip-weight", "0.1"], "--clip-weight, --clip and --tiny-vae need each other"),
        (["--prompt-field", "caption"], "prompts.txt: a .txt has no fields, so it has no caption"),
        (["--t-max", "1000"], "--t-max must be below the teacher's 1000 timesteps, got 1000"),
        (["--init", "{tmp}/none.safetensors"], "no such checkpoint"),
        (["--preset", "{tmp}/none.json"], "none.json: No such file"),
        (["--out", f"{__file__}/out"], "Not a directory"),
        (["--optimizer", "adam8bit"], "--optimizer adam8bit needs bitsandbytes: pip install bitsandbytes"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tmp_path, teacher_directory, prompts_file, capsys, monkeypatch, flags, message
):
    for module in ("bitsandbytes", "bitsandbytes.optim"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, module, None)
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
    printed, cost = capsys.readouterr().out.split("\n\n")
    settings = dict(line.split() for line in printed.splitlines())
    assert settings["batch_size"] == "3" and settings["guidance"] == "1.5" and settings["steps"] == "4"
    count = sum(p.numel() for p in tiny.emoji().unet.parameters())
    assert f"student {count / 1e6:,.1f} M" in cost and "memory per process" in cost
    assert "66,500 of 3 samples (processes: 1): 39900.00 epochs of 5 prompts" in cost
    assert not (tmp_path / "out").exists()
