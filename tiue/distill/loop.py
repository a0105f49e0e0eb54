"""The distillation loop: student and fake score in turn, resumed by running it again."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from tiue import files, losses
from tiue.checkpoint import Student, check_savable, save_student
from tiue.components import Components
from tiue.distill import runs
from tiue.distill.clip import ClipScore
from tiue.distill.config import DistillConfig
from tiue.distill.draws import Draws, SharedDraws
from tiue.distill.embeddings import Encoded, Texts, cache_texts, cut_prompts
from tiue.distill.optimizers import make_optimizer
from tiue.distill.prompt_store import PromptOrder, Prompts, store_prompts
from tiue.distill.report import write_report
from tiue.distill.scores import Scores
from tiue.distill.sharding import Average, Optimizer, Tensors, reshard, whole
from tiue.schedule import Schedule, closed_form, ddim_timesteps
from tiue.text_encoder import encode_text
from tiue.unet import Predictor, TiUE, check_shared_up_blocks

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class DivergedError(RuntimeError):
    """Losses or gradients are no longer finite; the message says when, on which prompts, and what is left."""


class StoppedError(RuntimeError):
    """A signal stopped the run, which is saved; the message says where it will go on."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class Distillation:
    """One run: the networks, their optimisers and the files they are kept in.

    Args:
        teacher: the model to distil; its UNet becomes the frozen score.
        prompts: captions; no pictures are needed. Repetitions are dropped.
        out: directory of the run, the same for all its processes; begun again, the run goes on from its newest
            checkpoint.
        config: see DistillConfig.
        initial: a student to begin from instead of the teacher's own weights; its schedules must be the run's.
        sample_prompts: drawn in a grid every `sample_every` iterations (by default the first eight prompts).
        clip: needed by `clip_weight`.

    Raises:
        ValueError: the run in `out` was begun with another configuration, teacher, initial student, number of
            processes or other prompts; `initial` has other schedules; teacher and text encoder do not fit; the disk
            has no space for the text embeddings; something is asked for that is not installed; or accelerate is
            configured for what a run cannot do (DeepSpeed, FSDP 1, FSDP with 8-bit Adam, accumulation of its own).
    """

    def __init__(
        self,
        teacher: Components,
        prompts: Iterable[str],
        out: Path,
        config: DistillConfig,
        *,
        initial: Student | None = None,
        sample_prompts: Sequence[str] | None = None,
        clip: ClipScore | None = None,
    ):
        check_shared_up_blocks(teacher.unet, config.shared_up_blocks)
        if config.clip_weight and clip is None:
            raise ValueError("`clip_weight` needs a CLIP model and a tiny autoencoder")
        self.config, self.out, self._teacher = config, out, teacher
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with="tensorboard", project_dir=out)
        _check_launch(self.accelerator, config)
        device, main = self.accelerator.device, self.accelerator.is_main_process
        # DDIM clips unless told otherwise, which the method never does.
        self.scheduler = DDIMScheduler.from_config(teacher.scheduler_config, clip_sample=False)
        self.abar = self.scheduler.alphas_cumprod.to(device)
        if config.t_max >= len(self.abar):
            raise ValueError(f"`t_max` must be below the teacher's {len(self.abar)} timesteps, got {config.t_max}")
        torch.manual_seed(config.seed)  # the adapters' initial weights
        timesteps = {steps: ddim_timesteps(teacher.scheduler_config, steps) for steps in config.steps}
        self.schedules = {n: closed_form(teacher.scheduler_config, chosen) for n, chosen in timesteps.items()}
        self.student = _student(teacher, timesteps, initial, config)
        check_savable(self.student)  # Before the first update, so that no finished run is lost.
        tiue = TiUE(
            self.student.components.unet,
            self.schedules[max(self.schedules)],
            self.student.encoder_timestep,
            config.shared_up_blocks,
        )
        tiue.unet.requires_grad_(True)
        identity = {
            "teacher": files.fingerprint(teacher.unet, teacher.text_encoder),
            "init": None if initial is None else files.fingerprint(initial.components.unet),
            "processes": self.accelerator.num_processes,
        }
        runs.claim(out, config, identity, write=False)  # compares, before anything is written
        self._null = self._embed([""])
        if self._null.shape[-1] != (width := tiue.unet.config.cross_attention_dim):
            raise ValueError(f"the text encoder gives {self._null.shape[-1]} channels, the UNet takes {width}")
        self.prompts = self._store(prompts)
        identity["prompts"] = self.prompts.digest
        runs.claim(out, config, identity, write=False)
        self.scores = Scores(teacher.unet.to(device), self.scheduler, config)
        self.tiue = tiue.to(device)
        self._unet_config = tiue.unet.config
        self._names = [name for name, _ in tiue.unet.named_parameters()]
        self._tune(tiue.unet, self.scores.network)
        predictor = Predictor(self.tiue, config.share_encoder)
        if config.compile:
            predictor.compile()
            self.scores.network.compile()
        self.model, self.student_optimizer = self._prepare(predictor, config.learning_rate)
        self.scores.network, self.fake_optimizer = self._prepare(self.scores.network, config.fake_learning_rate)
        decay = config.ema_decay**config.ema_every
        # For shards, torch has not all operations on lists of tensors.
        foreach = not self.accelerator.is_fsdp2
        self.ema = EMAModel(self.tiue.parameters(), decay=decay, use_ema_warmup=True, power=0.75, foreach=foreach)
        self.ema.to("cpu" if config.ema_on_cpu else device)
        self._clip = None if clip is None else clip.to(device)
        samples = list(sample_prompts or self.prompts[:8])
        self._samples = samples, self._embed(samples)
        self._texts = self._embedded()
        self._order = PromptOrder(len(self.prompts), config.seed)
        self._stopped = 0  # the number of a signal that arrived
        runs.claim(out, config, identity, write=main)  # nothing is left that might not be

    def run(self, progress: bool = True) -> Path:
        """Distil to the end, and return the path of the averaged student, `<out>/student.safetensors`.

        Raises DivergedError, before anything of it is saved; StoppedError for SIGTERM and SIGINT, after; ValueError if
        the processes do not see the same checkpoints.
        """
        config, main = self.config, self.accelerator.is_main_process
        first = self._saved = runs.restore(self.out, self._state())
        found = self.accelerator.gather(torch.tensor([first], device=self.accelerator.device)).tolist()
        if len(set(found)) > 1:
            raise ValueError(
                f"the processes found checkpoints of different steps {found}: do all of them see {self.out}?"
            )
        # What a resumed run makes again takes the place of what was.
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first + 1}})
        bar = tqdm(
            range(first, config.iterations),
            initial=first,
            total=config.iterations,
            disable=not (progress and main),
            desc="distil",
        )
        with ExitStack() as stack:
            stack.enter_context(_handled(self._stop))
            stack.enter_context(bar)
            log = None
            if main:
                log = stack.enter_context(closing(runs.Log(self.out / "losses.csv", first, self._columns())))
            for step in bar:
                begun = time.perf_counter()
                values = self._update(step)
                stopped = int(values.pop("stopped"))
                self._check(step, values)
                if (step + 1) % config.ema_every == 0 and not self.student_optimizer.step_was_skipped:
                    self._average()
                values["seconds"] = time.perf_counter() - begun
                samples = config.batch_size * config.accumulate * self.accelerator.num_processes
                values["samples_per_second"] = samples / values["seconds"]
                values |= {"student_lr": _rate(self.student_optimizer), "fake_lr": _rate(self.fake_optimizer)}
                self.accelerator.log(values, step=step + 1)
                bar.set_postfix({name: f"{values[name]:.4g}" for name in ("vsd", "kl", "fake")})
                if log is not None:
                    log.write(step + 1, values)
                if (step + 1) % config.sample_every == 0:
                    self._draw_samples(step + 1)
                if stopped or (step + 1) % config.checkpoint_every == 0:
                    self._save(step + 1)
                if stopped:
                    self.accelerator.end_training()
                    raise StoppedError(self._where(step, stopped), stopped)
        path = self.out / "student.safetensors"
        finished = self._finished()
        if main:
            save_student(path, finished)
            write_report(self.out)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # the processes part
        return path

    def _update(self, step: int) -> dict[str, float]:
        """One update of the student, then `fake_steps` of the fake score. Every draw is seeded by step and sample.

        Returns losses, gradient norms and the statistics of the predicted noise, over all processes.
        """
        config, accelerator = self.config, self.accelerator
        totals: dict[str, Tensor] = {}
        batches = []
        shared = SharedDraws(config.seed, step)
        schedule = self.schedules[shared.choice(config.steps)]
        for micro in range(config.accumulate):
            text, draws, indices = self._batch(step, micro)
            with self._sync(self.model, micro):
                z0, found = self._student_losses(text, draws, schedule, step, indices)
                loss = found["vsd"] + config.kl_weight * found["kl"]
                if "clip" in found:
                    loss = loss + self._clip_weight(step) * found["clip"]
                accelerator.backward(loss / config.accumulate)
            batches.append((z0.detach(), text, draws))
            _add(totals, config.accumulate, **found)
        totals["student_grad"] = self._optimize(self.student_optimizer, list(self.tiue.parameters()))
        for _ in range(config.fake_steps):
            null = shared.uniform() < config.null_probability
            for micro, (z0, text, draws) in enumerate(batches):
                with self._sync(self.scores.network, micro):
                    loss = self._fake_loss(z0, self._null.expand_as(text) if null else text, draws)
                    accelerator.backward(loss / config.accumulate)
                _add(totals, config.accumulate * config.fake_steps, fake=loss)
            totals["fake_grad"] = self._optimize(self.fake_optimizer, self.scores.parameters())
        return self._agreed(totals)

    def _agreed(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """The mean over all processes, and "stopped": the greatest number of a signal that one of them was sent."""
        values = torch.stack([*(value.detach().float() for value in totals.values())])
        stopped = torch.tensor([float(self._stopped)], device=values.device)
        values = self.accelerator.reduce(values, "mean")
        stopped = self.accelerator.gather(stopped).max()
        return dict(zip(totals, values.tolist(), strict=True)) | {"stopped": stopped.item()}

    def _check(self, step: int, values: dict[str, float]) -> None:
        """Raise DivergedError for what is not finite: with fp16 of the losses, else of the gradients, too."""
        # With fp16 the gradients are scaled; those that overflow are not applied, and the scale is lowered.
        names = ["vsd", "kl", "fake"] if self.accelerator.scaler is not None else list(values)
        if not all(math.isfinite(values[name]) for name in names):
            shown = ", ".join(f"{n} {values[n]:.4g}" for n in ("vsd", "kl", "fake", "student_grad", "fake_grad"))
            indices = [i for micro in range(self.config.accumulate) for i in self._indices(step, micro)]
            prompts = ", ".join(repr(self.prompts[i]) for i in indices)
            last = runs.checkpoints(self.out)[-1:]
            raise DivergedError(
                f"step {step + 1}: a loss or a gradient is not finite: {shown}; "
                f"{f'the last checkpoint is {last[0]}' if last else 'there is no checkpoint yet'}; prompts: {prompts}"
            )

    def _student_losses(
        self, text: Tensor, draws: Draws, schedule: Schedule, step: int, indices: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        noise = draws.normal(self._latent_shape())
        z0, predictions = self._draw(noise, text, schedule)
        t = draws.integers(config.t_min, config.t_max + 1)
        with torch.no_grad(), self.accelerator.autocast():
            z_t = self.scheduler.add_noise(z0, draws.normal(z0.shape[1:]), t)
            teacher_eps = self.scores.teacher(z_t, t, text, self._null, config.guidance)
            fake_eps = self.scores.fake(z_t, t, text, self._null, config.fake_guidance)
        eps = self._eps_maps(noise, predictions, schedule)
        found = {"vsd": losses.vsd_loss(z0, teacher_eps, fake_eps, 1 - self.abar[t]), "kl": losses.kl_loss(eps)}
        if self._clip is not None and self._clip_weight(step):
            with self.accelerator.autocast():
                found["clip"] = self._clip.loss(z0, [self.prompts[i] for i in indices])
        mean, variance = losses.noise_statistics(eps.detach())
        for i, timestep in enumerate(schedule.timesteps):
            found |= {f"mu_{timestep}": mean[i].mean(), f"v_{timestep}": variance[i].mean()}
        return z0, found

    def _draw(self, noise: Tensor, text: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """z_T [B,C,h,w] => (z_0 [B,C,h,w], predictions [N,B,C,h,w]), in float32."""
        return self.tiue.sum(noise, self.model(noise, text, schedule).float(), schedule)

    def _clip_weight(self, step: int) -> float:
        return self.config.clip_weight * (1 - step / self.config.iterations)

    def _fake_loss(self, z0: Tensor, text: Tensor, draws: Draws) -> Tensor:
        t = draws.integers(0, len(self.abar))
        noise = draws.normal(z0.shape[1:])
        with self.accelerator.autocast():
            eps = self.scores.fake_eps(self.scheduler.add_noise(z0, noise, t), t, text)
        return losses.fake_score_loss(eps, noise, self.abar[t].sqrt())

    def _eps_maps(self, noise: Tensor, predictions: Tensor, schedule: Schedule) -> Tensor:
        """The predicted noise [N,B,C,h,w]: as predicted, or from v along the DDIM path."""
        if self.scheduler.config.prediction_type == "epsilon":
            return predictions
        maps, z = [], noise
        self.scheduler.set_timesteps(len(schedule.timesteps))
        for t, v in zip(schedule.timesteps, predictions, strict=True):
            abar = self.abar[t]
            maps.append(abar.sqrt() * v + (1 - abar).sqrt() * z)
            z = self.scheduler.step(v, t, z).prev_sample
        return torch.stack(maps)

    def _store(self, prompts: Iterable[str]) -> Prompts:
        """The captions in a file of the run, and what is noteworthy about them."""
        directory = self.out / "prompts"
        if self.accelerator.is_main_process:
            repeated = store_prompts(prompts, directory)
            stored = Prompts(directory)
            if repeated:
                _log.info("%d prompts, without %d repetitions", len(stored), repeated)
            if cut := cut_prompts(self._teacher, stored):
                limit = self._teacher.tokenizer.model_max_length
                _log.warning("%d of %d prompts are longer than %d tokens, and are cut", cut, len(stored), limit)
        self.accelerator.wait_for_everyone()
        return Prompts(directory)

    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> Tensor:
        """Prompts => text embeddings float32 [B,L,D], by the text encoder where the run computes."""
        self._teacher.text_encoder.to(self.accelerator.device).requires_grad_(False)
        return encode_text(self._teacher, prompts).float()

    def _embedded(self) -> Texts:
        """The text embeddings of the run's prompts."""
        if not self.config.text_cache:
            return Encoded(self._teacher, self.prompts)
        cached = cache_texts(self._teacher, self.prompts, self.prompts.digest, self.out / "text", self.accelerator)
        self._teacher.text_encoder.cpu()
        return cached

    def _batch(self, step: int, micro: int) -> tuple[Tensor, Draws, list[int]]:
        """The text [B,L,D], the random numbers and the captions of one micro-batch."""
        size, accelerator = self.config.batch_size, self.accelerator
        first = (micro * accelerator.num_processes + accelerator.process_index) * size
        indices = self._indices(step, micro)
        return self._texts.rows(indices), Draws(self.config.seed, step, first, size, accelerator.device), indices

    def _indices(self, step: int, micro: int) -> list[int]:
        """Which captions: every process takes its own run of the global order."""
        size, accelerator = self.config.batch_size, self.accelerator
        chunk = (step * self.config.accumulate + micro) * accelerator.num_processes + accelerator.process_index
        return [self._order[chunk * size + i] for i in range(size)]

    def _latent_shape(self) -> tuple[int, int, int]:
        size = self._unet_config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self._unet_config.in_channels, height, width

    def _sync(self, model: nn.Module, micro: int):
        """Processes exchange gradients at the last micro-batch only."""
        last = micro == self.config.accumulate - 1
        return nullcontext() if last else self.accelerator.no_sync(model)

    def _tune(self, student: UNet2DConditionModel, fake: nn.Module) -> None:
        """What makes both trained networks faster or smaller, and changes no result."""
        for network in (student, fake):
            if self.config.gradient_checkpointing:
                network.enable_gradient_checkpointing()
            if self.config.channels_last:
                network.to(memory_format=torch.channels_last)

    def _prepare(self, network: nn.Module, learning_rate: float) -> tuple[nn.Module, Any]:
        trained = [p for p in network.parameters() if p.requires_grad]
        # A fused one skips what overflows by itself, and accelerate does not learn of it.
        fused = self.accelerator.scaler is None
        optimizer = make_optimizer(self.config.optimizer, trained, learning_rate, fused)
        return self.accelerator.prepare(network, optimizer)

    def _optimize(self, optimizer, parameters: list[nn.Parameter]) -> Tensor:
        norm = whole(self.accelerator.clip_grad_norm_(parameters, self.config.grad_clip))
        optimizer.step()
        optimizer.zero_grad()
        return torch.as_tensor(norm)

    def _average(self) -> None:
        """Let the averaged student follow."""
        device = self.accelerator.device
        if self.config.ema_on_cpu:
            self.ema.to(device)
        self.ema.step(self.tiue.parameters())
        if self.config.ema_on_cpu:
            self.ema.to("cpu")

    def _state(self) -> dict[str, runs.Stateful]:
        scaler = self.accelerator.scaler
        return {
            "student": Tensors(self.tiue.parameters()),
            "fake_score": Tensors(self.scores.parameters()),
            "student_optimizer": Optimizer(self.student_optimizer),
            "fake_optimizer": Optimizer(self.fake_optimizer),
            "ema": Average(self.ema),
            **({} if scaler is None else {"grad_scaler": scaler}),
        }

    def _save(self, step: int) -> None:
        """Write a checkpoint. Without space for it, the run goes on with those that there are."""
        state = {name: part.state_dict() for name, part in self._state().items()}
        if self.accelerator.is_main_process:
            try:
                runs.save(self.out, state, step, self.config.keep)
                self._saved = step
            except OSError as error:
                _log.warning("step %d: no checkpoint could be written: %s", step, files.one_line(error))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopped:  # asked twice: now
            raise KeyboardInterrupt
        self._stopped = number

    def _where(self, step: int, number: int) -> str:
        name = signal.Signals(number).name
        saved = f"saved at step {self._saved}" if self._saved else "not saved"
        return f"stopped by {name} after step {step + 1}, {saved}; the same command goes on from there"

    def _columns(self) -> list[str]:
        timesteps = sorted({t for schedule in self.schedules.values() for t in schedule.timesteps}, reverse=True)
        clip = ["clip"] if self._clip is not None else []
        noise = [f"{name}_{t}" for t in timesteps for name in ("mu", "v")]
        speed = ["student_lr", "fake_lr", "samples_per_second", "seconds"]
        return ["vsd", "kl", *clip, "fake", "student_grad", "fake_grad", *noise, *speed]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The student with its averaged weights, for as long as the context lasts."""
        self.ema.store(self.tiue.parameters())
        self.ema.copy_to(self.tiue.parameters())
        try:
            yield
        finally:
            reshard(self.model)
            self.ema.restore(self.tiue.parameters())

    @torch.no_grad()
    def _draw_samples(self, step: int) -> None:
        """A grid of the sample prompts by the averaged student, always from the same noise."""
        prompts, text = self._samples
        accelerator, vae = self.accelerator, self._teacher.vae
        noise = torch.randn(len(prompts), *self._latent_shape(), generator=torch.Generator().manual_seed(0))
        with self._averaged(), accelerator.autocast():
            z0, _ = self._draw(noise.to(text.device), text, self.schedules[max(self.schedules)])
        if not accelerator.is_main_process:
            return
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        vae.to(accelerator.device)
        with accelerator.autocast():
            pixels = [vae.decode(z[None] / vae.config.scaling_factor + shift).sample for z in z0.float()]
        vae.cpu()
        images = (torch.cat(pixels).float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
        rows = next(rows for rows in (4, 3, 2, 1) if len(prompts) % rows == 0)
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        grid = make_image_grid(pictures, rows, len(prompts) // rows)
        directory = self.out / "samples"
        directory.mkdir(exist_ok=True)
        grid.save(directory / f"step-{step:06}.png")
        accelerator.get_tracker("tensorboard").writer.add_images("samples", images, step)

    def _finished(self) -> Student:
        """The averaged student, with how it came to be. All processes of a run call it."""
        averaged = dict(zip(self._names, (whole(p).cpu() for p in self.ema.shadow_params), strict=True))
        unet = UNet2DConditionModel.from_config(self._unet_config).eval()
        unet.load_state_dict(averaged)
        components = dataclasses.replace(self.student.components, unet=unet)
        history = [
            *self.student.provenance.get("history", []),
            {"distilled": dataclasses.asdict(self.config)},
        ]
        provenance = self.student.provenance | {"history": history}
        return dataclasses.replace(self.student, components=components, provenance=provenance)


def _check_launch(accelerator: Accelerator, config: DistillConfig) -> None:
    """Raise ValueError for what accelerate can be configured to do and a run cannot."""
    kind = accelerator.distributed_type
    sharded = kind == DistributedType.FSDP
    if not (kind == DistributedType.NO or kind.startswith("MULTI_") or sharded):
        raise ValueError(f"accelerate is configured for {kind.value}; a run is shared by DDP or FSDP 2")
    if sharded and not accelerator.is_fsdp2:
        raise ValueError("accelerate is configured for FSDP 1; set fsdp_version: 2")
    if sharded and config.optimizer == "adam8bit":  # bitsandbytes would read past the end of a shard
        raise ValueError("`optimizer` adam8bit does not work with FSDP: bitsandbytes takes no shards")
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(f"accelerate is configured to accumulate {steps} gradients; set `accumulate` instead")


def _student(
    teacher: Components, schedules: dict[int, list[int]], initial: Student | None, config: DistillConfig
) -> Student:
    """The student to train: a copy of the teacher's UNet, or `initial`'s, which may have shared less or more."""
    first = schedules[max(schedules)][0]
    sharing = {"shared_up_blocks": config.shared_up_blocks, "share_encoder": config.share_encoder}
    if initial is None:
        components = dataclasses.replace(teacher, unet=copy.deepcopy(teacher.unet))
        return Student(components, first, schedules, teacher.name, **sharing)
    if initial.encoder_timestep != first or any(initial.schedules.get(n) != s for n, s in schedules.items()):
        raise ValueError(f"the initial student has schedules {initial.schedules}, this run needs {schedules}")
    kept = {name: getattr(initial.components, name) for name in ("unet", "name", "license")}
    components = dataclasses.replace(teacher, **kept)
    return dataclasses.replace(initial, components=components, schedules=schedules, **sharing)


def _rate(optimizer: Any) -> float:
    return optimizer.param_groups[0]["lr"]


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Signals that would end the process go to `handler`; only the main thread can ask for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _add(totals: dict[str, Tensor], parts: int, **values: Tensor) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value.detach().float() / parts
