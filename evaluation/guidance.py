"""`python -m evaluation.guidance`: the guidance with which a teacher denoises its own guided samples best.

VSD moves a student until the fake score, which denoises the student's samples, agrees with the guided teacher. But
samples that were drawn with a guidance scale are denoised best with a smaller one, above all at large timesteps. With
more than that, VSD goes on where the student is as guided as the samples are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.devices import default_device
from evaluation.painters import sample_ddim
from tiue.components import Components, load_components
from tiue.diffusion import Diffusion
from tiue.distill.command import status_of
from tiue.distill.scores import guided
from tiue.prompts import load_prompts
from tiue.settings import add_flags, check, given, setting
from tiue.text_encoder import encode_text

_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.95)  # of ranges of timesteps, as parts of all
_NOISES = 2  # of each sample, in each range


@dataclass(frozen=True)
class GuidanceConfig:
    """Settings of the comparison.

    Raises:
        ValueError: a setting is of another type or out of range.
    """

    guidance: float = setting(2.0, "guidance scale of the samples", at_least=0)
    scales: tuple[float, ...] = setting((1.0, 1.25, 1.5, 1.75, 2.0), "guidance scales to compare", at_least=0)
    samples: int = setting(128, "number of samples; prompts take turns", at_least=1)
    steps: int = setting(12, "DDIM steps of a sample", at_least=1)
    batch: int = setting(16, "samples at once", at_least=1)
    seed: int = setting(0, "of all noise", at_least=0)

    def __post_init__(self):
        check(self)


@torch.no_grad()
def compare_guidance(teacher: Components, prompts: Sequence[str], config: GuidanceConfig) -> dict[range, list[float]]:
    """Draw samples by DDIM with guidance, add noise, and denoise them with several guidance scales.

    Args:
        teacher: the model, on one device.
        prompts: of the samples.
        config: the settings.

    Returns:
        For each range of timesteps, the mean squared error of the prediction, eps or v, with each scale.
    """
    generator, trained = torch.Generator().manual_seed(config.seed), len(teacher.noise_schedule.abar)
    ranges = [range(low, high) for low, high in pairwise(round(part * trained) for part in _EDGES)]
    null, diffusion = encode_text(teacher, [""]), Diffusion(teacher.noise_schedule, teacher.text_encoder.device)
    errors = torch.zeros(len(ranges), len(config.scales))
    for start in tqdm(range(0, config.samples, config.batch), desc="samples", mininterval=5):
        numbers = range(start, min(start + config.batch, config.samples))
        text = encode_text(teacher, [prompts[i % len(prompts)] for i in numbers])
        latents = _samples(teacher, text, null, config, generator)
        for row, timesteps in enumerate(ranges):
            for _ in range(_NOISES):
                t = torch.randint(timesteps.start, timesteps.stop, (len(latents),), generator=generator)
                found = _errors(teacher, diffusion, latents, text, null, t, config.scales, generator)
                errors[row] += found * len(numbers) / (_NOISES * config.samples)
    return dict(zip(ranges, errors.tolist(), strict=True))


def _samples(
    teacher: Components, text: Tensor, null: Tensor, config: GuidanceConfig, generator: torch.Generator
) -> Tensor:
    schedule = teacher.noise_schedule
    noise = torch.randn((len(text), *teacher.geometry.latent_shape), generator=generator).to(text.device)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        return guided(teacher.unet, z, t, text, null, config.guidance)

    return sample_ddim(predict, schedule, schedule.timesteps(config.steps), noise)


def _errors(
    teacher: Components,
    diffusion: Diffusion,
    latents: Tensor,
    text: Tensor,
    null: Tensor,
    t: Tensor,
    scales: Sequence[float],
    generator: torch.Generator,
) -> Tensor:
    t = t.to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    z_t = diffusion.noised(latents, noise, t)
    without, conditional = (teacher.unet(z_t, t, one).sample.float() for one in (null.expand_as(text), text))
    target = diffusion.target(latents, noise, t)
    guided_ones = (without + scale * (conditional - without) for scale in scales)
    return torch.stack([(prediction - target).square().mean() for prediction in guided_ones]).cpu()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and print a table; on failure, print one line that says why.

    Returns:
        0; 2 if it cannot run; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.guidance",
        description="The error with which a teacher denoises its own guided samples, by timestep and guidance scale.",
    )
    parser.add_argument("--pipeline", required=True, type=Path, metavar="DIR", help="the teacher's pipeline directory")
    parser.add_argument(
        "--prompts", required=True, type=Path, metavar="PATH", help="captions: .txt (one a line), .jsonl or .parquet"
    )
    add_flags(parser, GuidanceConfig)
    arguments = parser.parse_args(argv)
    return status_of(parser.prog, lambda: _compare(arguments), GuidanceConfig)


def _compare(arguments: argparse.Namespace) -> None:
    config = GuidanceConfig(**given(arguments, GuidanceConfig))
    teacher, prompts = load_components(arguments.pipeline), load_prompts(arguments.prompts)
    device = default_device()
    teacher.unet.to(device)
    teacher.text_encoder.to(device)
    found = compare_guidance(teacher, prompts, config)
    print("| timesteps | " + " | ".join(f"guidance {scale:g}" for scale in config.scales) + " |")
    print("|---" * (1 + len(config.scales)) + "|")
    for timesteps, errors in found.items():
        cells = [f"**{error:.3f}**" if error == min(errors) else f"{error:.3f}" for error in errors]
        print(f"| {timesteps.start} to {timesteps.stop - 1} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
