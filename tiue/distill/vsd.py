"""The method of the paper (arXiv 2505.21960): VSD and KL for the student, denoising for the fake score.

Symbols are the paper's, as in docs/method.md. z_T is noise. z_0 are a picture's latents. eps_i is the noise that the
decoder predicts at timestep t_i. abar is the cumulative product of the alphas.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tiue import losses
from tiue.checkpoint import Student, check_savable, save_student
from tiue.components import Components
from tiue.diffusion import Diffusion
from tiue.distill.batches import Captions
from tiue.distill.clip import Alignment
from tiue.distill.config import DistillConfig
from tiue.distill.draws import Batch, Draws
from tiue.distill.method import Means, Method, Run, Trained
from tiue.distill.optimizers import check_optimizer, make_optimizer
from tiue.distill.samples import pictures, sample_noise
from tiue.distill.scores import Scores
from tiue.files import digest, fingerprint
from tiue.schedule import Schedule
from tiue.unet import Predictor, TiUE, check_shared_up_blocks


class Vsd(Method):
    """A student that learns from two scores, and a fake score that learns from the student. See `prepare`.

    Args:
        run: the run.
        config: the settings.
        teacher: the model to distill. Its UNet is frozen, and may get adapters, in place.
        student: the student. Its UNet is trained in place.
        captions: the run's captions.
        sample_prompts: prompts of the sample grid.
        clip: the CLIP loss, if `clip_weight` is above 0.
    """

    name = "distill"
    result = "student.safetensors"

    def __init__(
        self,
        run: Run,
        config: DistillConfig,
        teacher: Components,
        student: Student,
        captions: Captions,
        sample_prompts: Sequence[str],
        clip: Alignment | None = None,
    ):
        self.config, self.captions, self._accelerator = config, captions, run.accelerator
        self._declared, self._vae = student, teacher.vae
        device = run.accelerator.device
        self.process, self.latent_shape = teacher.noise_schedule, teacher.geometry.latent_shape
        self.diffusion = Diffusion(self.process, device)
        self.schedules = {n: self.process.closed_form(student.schedules[n]) for n in config.steps}
        self._clip = None if clip is None else clip.to(device)
        self._null = captions.encode([""])

        # `TiUE` and `Predictor` are views of the student's `unet`. accelerate wraps the predictor, so that processes
        # exchange its gradients. The weighted sum stays outside, in float32.
        unet = self._trainable(student.components.unet)
        self.tiue = TiUE(unet, self._most_steps, student.encoder_timestep, config.shared_up_blocks).to(device)
        predictor = Predictor(self.tiue, config.share_encoder)
        torch.manual_seed(config.seed)  # The initial weights of the fake score's adapters are random.
        self.scores = Scores(teacher.unet.to(device), self.diffusion, config)
        self._tune(unet, self.scores.network, predictor)
        self.student = self._trained(predictor, config.learning_rate)
        self.fake = self._trained(self.scores.network, config.fake_learning_rate)
        self.scores.network = self.fake.network  # The scores must call the wrapped network, too.
        self.model, self.networks = unet, {"student": self.student, "fake": self.fake}
        self.columns = self._columns()

        self._samples = sample_noise(len(sample_prompts), self.latent_shape), captions.encode(sample_prompts)

    def update(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Update the student once, then the fake score `fake_steps` times."""
        config, means, generated = self.config, Means(), []
        schedule = self.schedules[batch.shared.choice(config.steps)]

        # The student: VSD + kl_weight * KL(N(mu_i, v_i) of every noise map eps_i || N(0, 1)), and CLIP if it is used.
        for part in self.student.accumulating(batch.parts):
            text, z_T = self.captions.embeddings(part), part.draws.normal(self.latent_shape)
            z_0, predicted = self.predict(z_T, text, schedule)
            eps = self.noise_maps(z_T, predicted, schedule)
            terms = {"vsd": self.vsd(z_0, text, part.draws), "kl": losses.kl_loss(eps)}
            loss = terms["vsd"] + config.kl_weight * terms["kl"]
            if self._clip is not None and (weight := self.clip_weight(step)):
                with self._accelerator.autocast():
                    terms["clip"] = self._clip.loss(z_0, self.captions.of(part))
                loss = loss + weight * terms["clip"]
            self.student.backward(loss / config.accumulate)
            means.add(config.accumulate, **terms, **_statistics(eps, schedule))
            generated.append((z_0.detach(), text, part.draws))
        self.student.step()

        # The fake score learns to denoise these z_0, with probability `null_probability` without their text.
        for _ in range(config.fake_steps):
            without_text = batch.shared.uniform() < config.null_probability
            for z_0, text, draws in self.fake.accumulating(generated):
                loss = self.denoising(z_0, self._null.expand_as(text) if without_text else text, draws)
                self.fake.backward(loss / config.accumulate)
                means.add(config.accumulate * config.fake_steps, fake=loss)
            self.fake.step()
        return means.values

    def predict(self, z_T: Tensor, text: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Compute z_0 = w_0 z_T + sum_i w_i eps_i.

        Args:
            z_T: noise, (B, C, h, w).
            text: text embeddings, (B, L, D).
            schedule: the timesteps t_i and the weights w_i.

        Returns:
            z_0 (B, C, h, w) and the predictions, eps or v (N, B, C, h, w), in float32.
        """
        return self.tiue.sum(z_T, self.student(z_T, text, schedule).float(), schedule)

    def vsd(self, z_0: Tensor, text: Tensor, draws: Draws) -> Tensor:
        """Variational score distillation: 0.5 mean((z_0 - sg(z_0 - grad))^2), whose gradient is grad / numel.

        grad = (1 - abar_t) (eps_teacher - eps_fake) at z_t, for t ~ U{t_min..t_max}. It moves z_0 from pictures that
        the fake score expects towards those that the teacher expects. Both may be guided; sg stops the gradient.
        """
        config, null = self.config, self._null
        t = draws.integers(config.t_min, config.t_max + 1)
        with torch.no_grad(), self._accelerator.autocast():
            z_t = self.diffusion.noised(z_0, draws.normal(z_0.shape[1:]), t)
            eps_teacher = self.scores.teacher(z_t, t, text, null, config.guidance)
            eps_fake = self.scores.fake(z_t, t, text, null, config.fake_guidance)
        return losses.vsd_loss(z_0, eps_teacher, eps_fake, 1 - self.diffusion.abar[t])

    def denoising(self, z_0: Tensor, text: Tensor, draws: Draws) -> Tensor:
        """Denoising loss of the fake score: mse(sqrt(abar_t) eps_fake, sqrt(abar_t) noise) at new t ~ U{0..T-1}."""
        t = draws.integers(0, len(self.diffusion.abar))
        noise = draws.normal(z_0.shape[1:])
        with self._accelerator.autocast():
            eps_fake = self.scores.fake_eps(self.diffusion.noised(z_0, noise, t), t, text)
        return losses.fake_score_loss(eps_fake, noise, self.diffusion.abar[t].sqrt())

    def noise_maps(self, z_T: Tensor, predicted: Tensor, schedule: Schedule) -> Tensor:
        """Return the noise eps_i, (N, B, C, h, w), which the KL term is about.

        A model that predicts v implies it along the DDIM path from z_T.
        """
        maps, z = [], z_T
        steps = self.process.ddim_steps(schedule.timesteps)
        for t, (a, b), prediction in zip(schedule.timesteps, steps, predicted, strict=True):
            maps.append(self.diffusion.noise(prediction, z, torch.tensor(t)))
            z = a * z + b * prediction
        return torch.stack(maps)

    def clip_weight(self, step: int) -> float:
        """Return the weight of the CLIP loss. It falls to 0 over the run."""
        return self.config.clip_weight * (1 - step / self.config.iterations)

    def sample(self) -> Tensor | None:
        """Make the sample pictures, uint8 (n, 3, H, W), always from the same noise. None on other processes."""
        noise, text = self._samples
        z_T, schedule = noise.to(text.device), self._most_steps
        with torch.no_grad(), self._accelerator.autocast():
            z_0, _ = self.tiue.sum(z_T, self.student.evaluate(z_T, text, schedule).float(), schedule)
            return pictures(self._vae, z_0) if self._accelerator.is_main_process else None

    def save(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write the student with averaged weights, and with the settings in its provenance."""
        save_student(path, self.finished(weights))

    def finished(self, weights: Mapping[str, Tensor]) -> Student:
        """Put the averaged weights and the settings of this run into the student."""
        unet = UNet2DConditionModel.from_config(self.model.config).eval()
        unet.load_state_dict(weights)
        before = self._declared.provenance.get("history", [])  # Other programs may write something else than a list.
        history = [*(before if isinstance(before, list) else [before]), {"distilled": asdict(self.config)}]
        provenance = self._declared.provenance | {"history": history}
        components = replace(self._declared.components, unet=unet)
        return replace(self._declared, components=components, provenance=provenance)

    def describe(self, batch: Batch) -> str:
        """List the captions of a batch."""
        return self.captions.describe(batch)

    @property
    def _most_steps(self) -> Schedule:
        return self.schedules[max(self.schedules)]

    def _columns(self) -> list[str]:
        timesteps = sorted({t for schedule in self.schedules.values() for t in schedule.timesteps}, reverse=True)
        clip = ["clip"] if self._clip is not None else []
        return ["vsd", "kl", *clip, "fake", *(f"{name}_{t}" for t in timesteps for name in ("mu", "v"))]

    def _trainable(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """Choose the weights of the student that are trained: all."""
        return unet.requires_grad_(True)

    def _tune(self, student: UNet2DConditionModel, fake: nn.Module, predictor: nn.Module) -> None:
        """Make both trained networks faster or smaller, without changing results."""
        for network in (student, fake):
            if self.config.gradient_checkpointing:
                network.enable_gradient_checkpointing()
            if self.config.channels_last:
                network.to(memory_format=torch.channels_last)
        if self.config.compile:
            predictor.compile()
            fake.compile()

    def _trained(self, network: nn.Module, learning_rate: float) -> Trained:
        optimizer = make_optimizer(self.config.optimizer, network, learning_rate, self._accelerator)
        return Trained(self._accelerator, network, optimizer, self.config.grad_clip)


def prepare(
    teacher: Components,
    prompts: Iterable[str],
    out: Path,
    config: DistillConfig,
    *,
    initial: Student | None = None,
    sample_prompts: Sequence[str] | None = None,
    clip: Alignment | None = None,
    method: type[Vsd] = Vsd,
) -> tuple[Run, Vsd]:
    """Prepare a distillation for `loop.train`.

    Args:
        teacher: the model to distill. Its UNet is changed in place.
        prompts: captions. No pictures are needed. Repetitions are dropped.
        out: directory of the run, the same for all its processes.
        config: the settings.
        initial: a student to start from, instead of the teacher's weights. It must have the run's schedules, and the
            teacher's noise process.
        sample_prompts: prompts of the sample grid, by default the first eight of `prompts`.
        clip: the CLIP loss, if `clip_weight` is above 0.
        method: the class, for a method that derives from this one.

    Returns:
        The run and the method.

    Raises:
        ValueError: `out` holds another run; `initial` does not fit the teacher or the settings; teacher and text
            encoder do not fit; the student could not be saved; the disk is too small for the text embeddings; a package
            is not installed; or accelerate is configured for something unsupported.
    """
    check_shared_up_blocks(teacher.unet, config.shared_up_blocks)
    if (config.clip_weight > 0) != (clip is not None):
        found = "without" if clip is None else "with"
        raise ValueError(f"`clip_weight` {config.clip_weight:g} {found} a CLIP loss: expected both or neither")
    if config.t_max >= (timesteps := len(teacher.noise_schedule.abar)):
        raise ValueError(f"`t_max` must be below the teacher's {timesteps} timesteps, got {config.t_max}")
    run = Run(out, config)
    check_optimizer(config.optimizer, run.accelerator)
    student = _student(teacher, initial, config)
    run.identify(
        **teacher_identity(teacher),
        init=None if initial is None else fingerprint(initial.components.unet),
        clip=None if clip is None else clip.fingerprint,
    )
    check_savable(student)
    # Up to here, nothing was written.
    captions = Captions(run, teacher, prompts)
    run.identify(prompts=captions.digest)
    made = method(run, config, teacher, student, captions, sample_prompts or captions[:8], clip)
    if config.text_cache:
        captions.cache()
    return run, made


def teacher_identity(teacher: Components) -> dict[str, str]:
    """Identify a teacher by its weights and its noise process, for `Run.identify`."""
    noise_process = digest([repr(teacher.noise_schedule)])
    return {"teacher": fingerprint(teacher.unet, teacher.text_encoder), "noise_process": noise_process}


def _student(teacher: Components, initial: Student | None, config: DistillConfig) -> Student:
    """Return the student to train: a copy of the teacher, or `initial`. It may share another number of up blocks."""
    schedules = {steps: teacher.noise_schedule.timesteps(steps) for steps in config.steps}
    first = schedules[max(schedules)][0]
    sharing = {"shared_up_blocks": config.shared_up_blocks, "share_encoder": config.share_encoder}
    if initial is None:
        components = replace(teacher, unet=copy.deepcopy(teacher.unet))
        return Student(components, first, schedules, teacher.name, **sharing)
    if initial.encoder_timestep != first or any(initial.schedules.get(n) != s for n, s in schedules.items()):
        raise ValueError(f"the initial student has schedules {initial.schedules}, this run needs {schedules}")
    theirs, ours = initial.components.noise_schedule, teacher.noise_schedule
    if (theirs.prediction_type, theirs.abar) != (ours.prediction_type, ours.abar):
        found = f"{theirs.prediction_type} and its own noise process"
        raise ValueError(f"the initial student learned {found}; the teacher has {ours.prediction_type} and another one")
    kept = {name: getattr(initial.components, name) for name in ("unet", "name", "license")}
    return replace(initial, components=replace(teacher, **kept), schedules=schedules, **sharing)


def _statistics(eps: Tensor, schedule: Schedule) -> dict[str, Tensor]:
    """Return the mean mu and the variance v of the predicted noise at every timestep, over the batch."""
    mean, variance = losses.noise_statistics(eps.detach())
    found = {}
    for i, t in enumerate(schedule.timesteps):
        found |= {f"mu_{t}": mean[i].mean(), f"v_{t}": variance[i].mean()}
    return found
