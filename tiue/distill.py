"""The distillation loop: student and fake score in turn, resumed by running it again."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from tiue import losses, runs
from tiue.checkpoint import Student, save_student
from tiue.components import Components, encode_text
from tiue.config import DistillConfig
from tiue.prompts import PromptOrder
from tiue.schedule import ddim_timesteps
from tiue.scores import Scores
from tiue.unet import TiUE, check_shared_up_blocks


class DivergedError(RuntimeError):
    """Losses or gradients are no longer finite; the message gives the iteration and the values, in one line."""


class _Predict(nn.Module):
    """`TiUE.predict` as a forward, which is what accelerate wraps."""

    def __init__(self, tiue: TiUE):
        super().__init__()
        self.tiue = tiue

    def forward(self, latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.tiue.predict(latents, text)


class Distillation:
    """One run: the networks, their optimisers and the files they are kept in.

    Args:
        teacher: the model to distil; its UNet becomes the frozen score.
        prompts: captions; no pictures are needed.
        out: directory of the run; begun again, the run goes on from its newest checkpoint.
        config: see DistillConfig.
        initial: a student to begin from instead of the teacher's own weights; its schedule must be the run's.
        sample_prompts: drawn in a grid every `sample_every` iterations (by default the first eight prompts).

    Raises:
        ValueError: the run in `out` was begun with another configuration, teacher, initial student, number of
            processes or other prompts; or `initial` has another schedule.
    """

    def __init__(
        self,
        teacher: Components,
        prompts: Sequence[str],
        out: Path,
        config: DistillConfig,
        *,
        initial: Student | None = None,
        sample_prompts: Sequence[str] | None = None,
    ):
        check_shared_up_blocks(teacher.unet, config.shared_up_blocks)
        self.config, self.out, self._teacher = config, out, teacher
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with="tensorboard", project_dir=out)
        device = self.accelerator.device
        torch.manual_seed(config.seed)  # the adapters' initial weights
        timesteps = ddim_timesteps(teacher.scheduler_config, config.steps)
        self.student = _student(teacher, timesteps, initial, config.shared_up_blocks)
        tiue = self.student.tiue()
        tiue.unet.requires_grad_(True)
        identity = {
            "teacher": runs.fingerprint(teacher.unet, teacher.text_encoder),
            "prompts": runs.digest(prompts),
            "init": None if initial is None else runs.fingerprint(initial.components.unet),
            "processes": self.accelerator.num_processes,
        }
        runs.claim(out, config, identity, write=self.accelerator.is_main_process)
        # DDIM clips unless told otherwise, which the method never does.
        self.scheduler = DDIMScheduler.from_config(teacher.scheduler_config, clip_sample=False)
        self.scheduler.set_timesteps(config.steps)
        self.abar = self.scheduler.alphas_cumprod.to(device)
        self.scores = Scores(teacher.unet.to(device), self.scheduler, config)
        self.tiue = tiue.to(device)
        student_optimizer = torch.optim.Adam(self.tiue.parameters(), lr=config.learning_rate)
        fake_optimizer = torch.optim.Adam(self.scores.parameters(), lr=config.fake_learning_rate)
        self.model, self.scores.network, self.student_optimizer, self.fake_optimizer = self.accelerator.prepare(
            _Predict(self.tiue), self.scores.network, student_optimizer, fake_optimizer
        )
        self.ema = EMAModel(self.tiue.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        teacher.text_encoder.to(device).requires_grad_(False)
        teacher.vae.to(device)
        self.prompts = PromptOrder(list(prompts), config.seed)
        self._null = self._encode([""])
        samples = list(sample_prompts or list(prompts)[:8])
        self._samples = samples, self._encode(samples)

    def run(self, progress: bool = True) -> Path:
        """Distil to the end, and return the path of the averaged student, `<out>/student.safetensors`.

        Raises DivergedError, before anything of it is saved.
        """
        config, main = self.config, self.accelerator.is_main_process
        first = runs.restore(self.out, self._state(), self.accelerator.device)
        self.accelerator.init_trackers("tensorboard")
        bar = tqdm(
            range(first, config.iterations),
            initial=first,
            total=config.iterations,
            disable=not (progress and main),
            desc="distil",
        )
        with ExitStack() as stack:
            stack.enter_context(bar)
            log = stack.enter_context(closing(runs.Log(self.out / "losses.csv", first))) if main else None
            for step in bar:
                begun = time.perf_counter()
                values = self._update(step)
                self._check(step, values)
                if not self.student_optimizer.step_was_skipped:
                    self.ema.step(self.tiue.parameters())
                values["seconds"] = time.perf_counter() - begun
                self.accelerator.log(values, step=step + 1)
                bar.set_postfix({name: f"{values[name]:.4g}" for name in ("vsd", "kl", "fake")})
                if log is not None:
                    log.write(step + 1, values)
                    if (step + 1) % config.sample_every == 0:
                        self._draw_samples(step + 1)
                    if (step + 1) % config.checkpoint_every == 0:
                        runs.save(self.out, self._state(), step + 1, config.keep)
        path = self.out / "student.safetensors"
        if main:
            with self._averaged():
                save_student(path, self._finished())
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # the processes part
        return path

    def _update(self, step: int) -> dict[str, float]:
        """One update of the student, then `fake_steps` of the fake score. Every draw is seeded by (seed, step)."""
        config, accelerator = self.config, self.accelerator
        totals: dict[str, float] = {}
        batches = []
        for micro in range(config.accumulate):
            draw = Draw(config.seed, step, micro, accelerator.process_index, accelerator.device)
            text = self._encode(self._batch(step, micro))
            with self._sync(self.model, micro):
                z0, vsd, kl = self._student_losses(text, draw)
                accelerator.backward((vsd + config.kl_weight * kl) / config.accumulate)
            batches.append((z0.detach(), text, draw))
            _add(totals, config.accumulate, vsd=vsd, kl=kl)
        totals["student_grad"] = self._optimize(self.student_optimizer, list(self.tiue.parameters()))
        for _ in range(config.fake_steps):
            for micro, (z0, text, draw) in enumerate(batches):
                with self._sync(self.scores.network, micro):
                    loss = self._fake_loss(z0, text, draw)
                    accelerator.backward(loss / config.accumulate)
                _add(totals, config.accumulate * config.fake_steps, fake=loss)
            totals["fake_grad"] = self._optimize(self.fake_optimizer, self.scores.parameters())
        return totals

    def _check(self, step: int, values: dict[str, float]) -> None:
        """Raise DivergedError for what is not finite: with fp16 of the losses, else of the gradients, too."""
        # With fp16 the gradients are scaled; those that overflow are not applied, and the scale is lowered.
        names = ["vsd", "kl", "fake"] if self.accelerator.scaler is not None else list(values)
        if not all(math.isfinite(values[name]) for name in names):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise DivergedError(f"step {step + 1}: a loss or a gradient is not finite: {shown}")

    def _student_losses(self, text: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        noise = draw.normal((len(text), *self._latent_shape()))
        z0, eps = self.model(noise, text)
        t = draw.integers(config.t_min, config.t_max + 1, len(text))
        with torch.no_grad(), self.accelerator.autocast():
            z_t = self.scheduler.add_noise(z0, draw.normal(z0.shape), t)
            teacher_eps = self.scores.teacher(z_t, t, text, self._null, config.guidance)
            fake_eps = self.scores.fake(z_t, t, text, self._null, config.fake_guidance)
        vsd = losses.vsd_loss(z0, teacher_eps, fake_eps, 1 - self.abar[t])
        return z0, vsd, losses.kl_loss(self._eps_maps(noise, eps))

    def _fake_loss(self, z0: Tensor, text: Tensor, draw: Draw) -> Tensor:
        t = draw.integers(0, len(self.abar), len(z0))
        noise = draw.normal(z0.shape)
        if draw.uniform() < self.config.null_probability:
            text = self._null.expand_as(text)
        with self.accelerator.autocast():
            eps = self.scores.fake_eps(self.scheduler.add_noise(z0, noise, t), t, text)
        return losses.fake_score_loss(eps, noise, self.abar[t].sqrt())

    def _eps_maps(self, noise: Tensor, predictions: Tensor) -> Tensor:
        """The predicted noise [N,B,C,h,w]: as predicted, or from v along the DDIM path."""
        if self.scheduler.config.prediction_type == "epsilon":
            return predictions
        maps, z = [], noise
        for t, v in zip(self.tiue.schedule.timesteps, predictions, strict=True):
            abar = self.abar[t]
            maps.append(abar.sqrt() * v + (1 - abar).sqrt() * z)
            z = self.scheduler.step(v, t, z).prev_sample
        return torch.stack(maps)

    def _batch(self, step: int, micro: int) -> list[str]:
        """The prompts of one micro-batch: every process takes its own run of the global order."""
        size, accelerator = self.config.batch_size, self.accelerator
        chunk = (step * self.config.accumulate + micro) * accelerator.num_processes + accelerator.process_index
        return [self.prompts[chunk * size + i] for i in range(size)]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        return encode_text(self._teacher, prompts)

    def _latent_shape(self) -> tuple[int, int, int]:
        config = self.tiue.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def _sync(self, model: nn.Module, micro: int):
        """Processes exchange gradients at the last micro-batch only."""
        last = micro == self.config.accumulate - 1
        return nullcontext() if last else self.accelerator.no_sync(model)

    def _optimize(self, optimizer, parameters: list[nn.Parameter]) -> float:
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    def _state(self) -> dict[str, runs.Stateful]:
        scaler = self.accelerator.scaler
        return {
            "student": runs.Tensors(self.tiue.parameters()),
            "fake_score": runs.Tensors(self.scores.parameters()),
            "student_optimizer": self.student_optimizer,
            "fake_optimizer": self.fake_optimizer,
            "ema": self.ema,
            **({} if scaler is None else {"grad_scaler": scaler}),
        }

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The student with its averaged weights, for as long as the context lasts."""
        self.ema.store(self.tiue.parameters())
        self.ema.copy_to(self.tiue.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.tiue.parameters())

    @torch.no_grad()
    def _draw_samples(self, step: int) -> None:
        """A grid of the sample prompts by the averaged student, always from the same noise."""
        prompts, text = self._samples
        noise = torch.randn(len(prompts), *self._latent_shape(), generator=torch.Generator().manual_seed(0))
        with self._averaged(), self.accelerator.autocast():
            z0 = self.tiue(noise.to(text.device), text)
            vae = self._teacher.vae
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            pixels = vae.decode(z0 / vae.config.scaling_factor + shift).sample
        images = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        rows = next(rows for rows in (4, 3, 2, 1) if len(prompts) % rows == 0)
        grid = make_image_grid([Image.fromarray(image) for image in images], rows, len(prompts) // rows)
        directory = self.out / "samples"
        directory.mkdir(exist_ok=True)
        grid.save(directory / f"step-{step:06}.png")

    def _finished(self) -> Student:
        """The student as it stands in memory, with how it came to be."""
        history = [
            *self.student.provenance.get("history", []),
            {"distilled": dataclasses.asdict(self.config)},
        ]
        return dataclasses.replace(self.student, provenance=self.student.provenance | {"history": history})


def _student(teacher: Components, timesteps: list[int], initial: Student | None, shared_up_blocks: int) -> Student:
    """The student to train: a copy of the teacher's UNet, or `initial`'s, which may have shared less or more."""
    schedules = {len(timesteps): timesteps}
    if initial is None:
        components = dataclasses.replace(teacher, unet=copy.deepcopy(teacher.unet))
        return Student(components, timesteps[0], schedules, teacher.name, shared_up_blocks=shared_up_blocks)
    if initial.schedules.get(len(timesteps)) != timesteps or initial.encoder_timestep != timesteps[0]:
        raise ValueError(f"the initial student has schedules {initial.schedules}, this run needs {timesteps}")
    kept = {name: getattr(initial.components, name) for name in ("unet", "name", "licence")}
    components = dataclasses.replace(teacher, **kept)
    return dataclasses.replace(initial, components=components, schedules=schedules, shared_up_blocks=shared_up_blocks)


class Draw:
    """The random numbers of one micro-batch on one process: the same whenever it is drawn again."""

    def __init__(self, seed: int, step: int, micro: int, rank: int, device: torch.device):
        # A CPU generator, so that the numbers do not depend on the device; the words are hashed, so that no
        # two micro-batches are alike.
        words = np.random.SeedSequence((seed, step, micro, rank)).generate_state(2, np.uint32).tolist()
        self._generator = torch.Generator().manual_seed(words[0] << 31 | words[1] >> 1)
        self._device = device

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 of `shape`."""
        return torch.randn(*shape, generator=self._generator).to(self._device)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """Uniform int64 [count] in low..high-1."""
        return torch.randint(low, high, (count,), generator=self._generator).to(self._device)

    def uniform(self) -> float:
        """One number in [0, 1)."""
        return torch.rand((), generator=self._generator).item()


def _add(totals: dict[str, float], parts: int, **values: Tensor) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value.item() / parts
