"""Adversarial diffusion distillation (ADD), the method of SD-Turbo. arXiv 2311.17042.

The student starts from the teacher and works at few timesteps s, (999, 749, 499, 249). With a picture's latents z_0,

    z_s = sqrt(abar_s) z_0 + sqrt(1 - abar_s) noise,    x = the picture that the student's prediction at z_s implies,
    loss = L_adversarial + lambda L_distillation,
    L_adversarial  = -sum over depths k of D_k(F_k(x)),
    L_distillation = c(t) |x - sg(x_teacher(sg(x)_t, t))|^2,    c(t) = sqrt(abar_t),

where the teacher, with guidance, denoises the student's own picture, noised to a random timestep t. sg stops the
gradient. F is a frozen observer of pictures, and D_k are trained heads on its features (see `critic`). Their loss is

    sum over k of relu(1 - D_k(F_k(real))) + relu(1 + D_k(F_k(x))) + gamma R1.

The distillation loss is taken in latents, the adversarial one in pixels. The student is sampled in 1 step, or in
several with new noise between them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from recipes.baselines.config import AddConfig
from recipes.baselines.critic import Critic, gradient_penalty, hinge_loss, student_loss
from recipes.baselines.few_steps import WITHOUT_BOUNDARY, FewSteps, grid, lcm_scheduler, start_run
from recipes.baselines.observers import Observer
from recipes.baselines.pictures import CaptionedPictures, encode_latents
from tiue.components import Components, decode_latents
from tiue.distill.draws import Batch, Draws
from tiue.distill.method import Means, Run
from tiue.distill.scores import guided


class Add(FewSteps):
    """A student against a critic. See the module, and `prepare`."""

    name = "add"
    columns = ("adversarial", "distillation", "critic", "penalty")
    config: AddConfig

    def __init__(
        self,
        run: Run,
        config: AddConfig,
        teacher: Components,
        student: UNet2DConditionModel,
        data: CaptionedPictures,
        observer: Observer,
        sample_prompts: Sequence[str],
    ):
        scheduler = lcm_scheduler(teacher, len(config.timesteps), WITHOUT_BOUNDARY)
        super().__init__(run, teacher, student, data, scheduler, sample_prompts)
        self.observer = observer
        self._timesteps = torch.tensor(config.timesteps, device=run.accelerator.device)
        torch.manual_seed(config.seed)  # The initial weights of the critic are random.
        self._heads = Critic(observer.widths, self.null.shape[2] + observer.embedding).to(run.accelerator.device)
        self.critic = self._trained(self._heads, config.critic_learning_rate)
        self.networks |= {"critic": self.critic}

    def update(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Update the student once, then the critic."""
        config, means, parts, generated = self.config, Means(), len(batch.parts), []

        self._heads.requires_grad_(False)
        for part in self.student.accumulating(batch.parts):
            real, captions = self.data.of(part)
            text = self.embed(captions)
            s = self._timesteps[part.draws.integers(0, len(self._timesteps))]
            x = self.estimate(encode_latents(self.vae, real), s, text, part.draws)
            with self._accelerator.autocast():
                fake = decode_latents(self.vae, x).float()
                with torch.no_grad():
                    seen, embedding = self.observer.look(real)
                # From pure noise, the student cannot know the real picture, so the critic must not ask for it.
                embedding = embedding * (self.diffusion.abar[s] > 0).view(-1, 1)
                condition = torch.cat([text.mean(1), embedding], dim=1)
                adversarial = student_loss(self._heads(self.observer.look(fake)[0], condition))
            distillation = self.distillation(x, text, part.draws)
            self.student.backward((adversarial + config.distillation_weight * distillation) / parts)
            means.add(parts, adversarial=adversarial, distillation=distillation)
            generated.append((seen, fake.detach(), condition))
        self.student.step()

        self._heads.requires_grad_(True)
        for seen, fake, condition in self.critic.accumulating(generated):
            with torch.no_grad(), self._accelerator.autocast():
                made = self.observer.look(fake)[0]
            # Copies, because FlopCounterMode cannot follow gradients of leaves.
            seen = [values.float().requires_grad_(True).clone() for values in seen]
            real_logits = self.critic(seen, condition)
            hinge = hinge_loss(real_logits, self.critic([values.float() for values in made], condition))
            penalty = gradient_penalty(real_logits, seen)
            self.critic.backward((hinge + config.penalty_weight * penalty) / parts)
            means.add(parts, critic=hinge, penalty=penalty)
        self.critic.step()
        return means.values

    def estimate(self, z_0: Tensor, s: Tensor, text: Tensor, draws: Draws) -> Tensor:
        """Compute the student's picture x, float32 (B, C, h, w), at z_0 noised to timesteps s, int64 (B,)."""
        z_s = self.diffusion.noised(z_0, draws.normal(z_0.shape[1:]), s)
        with self._accelerator.autocast():
            predicted = self.student(z_s, s, text).sample.float()
        return self.diffusion.picture(predicted, z_s, s)

    def distillation(self, x: Tensor, text: Tensor, draws: Draws) -> Tensor:
        """Compute L_distillation of the student's pictures x (B, C, h, w), a scalar."""
        t = draws.integers(0, len(self.diffusion.abar))
        with torch.no_grad(), self._accelerator.autocast():
            z_t = self.diffusion.noised(x, draws.normal(x.shape[1:]), t)
            predicted = guided(self.teacher, z_t, t, text, self.null, self.config.guidance)
            target = self.diffusion.picture(predicted, z_t, t)
        return distillation_loss(x, target, self.diffusion.abar[t].sqrt())


def distillation_loss(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of c |x - target|^2 for pictures (B, C, h, w) and weights c (B,)."""
    return (weight.view(-1, 1, 1, 1) * (x - target.detach()).square()).mean()


def prepare(
    teacher: Components,
    data: CaptionedPictures,
    out: Path,
    config: AddConfig,
    observer: Observer,
    *,
    initial: UNet2DConditionModel | None = None,
    sample_prompts: Sequence[str] = (),
) -> tuple[Run, Add]:
    """Prepare adversarial distillation for `loop.train`.

    Args:
        teacher: the model to distill.
        data: pictures with captions.
        out: directory of the run.
        config: the settings.
        observer: the frozen network below the critic.
        initial: a UNet to start from, instead of the teacher's weights.
        sample_prompts: prompts of the sample grid.

    Returns:
        The run and the method.

    Raises:
        ValueError: `out` holds another run, `timesteps` are not those of samples, or there are several processes.
    """
    sampled = grid(len(teacher.noise_schedule.abar), len(config.timesteps))
    if sorted(config.timesteps) != sampled:  # Samples would begin at timesteps that it does not know.
        found = ", ".join(map(str, config.timesteps))
        raise ValueError(f"`timesteps` must be {', '.join(map(str, sampled[::-1]))} for this teacher, got {found}")
    run = start_run(out, config, teacher, data, initial, observer=observer.fingerprint)
    if run.accelerator.num_processes > 1:
        raise ValueError("ADD runs in one process: R1 needs gradients of gradients, which DDP does not exchange")
    student = copy.deepcopy(teacher.unet if initial is None else initial)
    return run, Add(run, config, teacher, student, data, observer, sample_prompts)
