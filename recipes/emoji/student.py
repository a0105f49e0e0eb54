"""The student. A warm start on pairs that the teacher draws, then VSD + KL by `python -m tiue`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiue_runtime.bundle import Bundle, Prompts, write_bundle
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from export.onnx import main as export
from recipes.emoji import loop
from recipes.emoji.data import Drawings, concept_list
from recipes.emoji.presets import Preset
from recipes.emoji.teacher import STYLE_PROBABILITY, load_teacher
from tiue.checkpoint import Student, load_student, save_student
from tiue.components import load_components
from tiue.distill.loop import Distillation
from tiue.schedule import ddim_timesteps
from tiue.text_encoder import encode_text

PAIR_BATCH = 64
EXAMPLES = ("a red heart", "a rocket", "cat face", "pizza, noto style", "a rainbow", "sunflower, fluent style")
LICENCE = "Apache-2.0 AND MIT AND CC-BY-4.0"  # of the drawings


def all_captions(drawings: Drawings) -> list[str]:
    """Every caption that a training drawing may have, with and without its style word."""
    texts: dict[str, None] = {}
    for row in np.flatnonzero(~drawings.held_out):
        for variant in range(len(drawings.captions[drawings.concept[row]])):
            texts[drawings.caption(row, variant, False)] = None
            texts[drawings.caption(row, variant, True)] = None
    return list(texts)


def draw_captions(drawings: Drawings, count: int, seed: int) -> list[str]:
    """Captions of random training drawings, with a style word as often as the teacher saw one."""
    random = np.random.default_rng(seed)
    rows = random.choice(np.flatnonzero(~drawings.held_out), count)
    return [
        drawings.caption(
            row,
            random.integers(len(drawings.captions[drawings.concept[row]])),
            random.random() < STYLE_PROBABILITY,
        )
        for row in rows
    ]


@torch.no_grad()
def sample_teacher(
    pipeline: StableDiffusionPipeline, text: Tensor, null: Tensor, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Noise (n, C, h, w) => the teacher's scaled latents after `steps` DDIM steps with guidance.

    The teacher begins at t = 999, where its training ended with noise: "trailing" spacing. Stable Diffusion's "leading"
    begins lower, which washes colours out (arXiv 2305.08891). The student needs no such care: it learns the result.
    """
    device = pipeline.unet.device
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    with loop.autocast(device.type):
        return pipeline(
            prompt_embeds=text.to(device),
            negative_prompt_embeds=null.expand_as(text).to(device),
            latents=noise.to(device),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images.float()


def make_pairs(preset: Preset, drawings: Drawings, pipeline: StableDiffusionPipeline, path: Path) -> dict:
    """Noise and what the teacher makes of it, drawn once: {"captions", "noise", "latents"}."""
    if not path.exists():
        captions = draw_captions(drawings, preset.pairs, preset.seed)
        generator = torch.Generator().manual_seed(preset.seed)
        size = pipeline.unet.config.sample_size
        noise = torch.randn(preset.pairs, preset.latent_channels, size, size, generator=generator)
        latents = []
        null = _encode(pipeline, [""])
        for start in tqdm(range(0, preset.pairs, PAIR_BATCH), desc="pairs", mininterval=5):
            part = slice(start, start + PAIR_BATCH)
            text = _encode(pipeline, captions[part])
            latents.append(sample_teacher(pipeline, text, null, noise[part], preset.pair_steps, preset.guidance).cpu())
        temporary = path.with_suffix(".tmp")
        torch.save({"captions": captions, "noise": noise, "latents": torch.cat(latents)}, temporary)
        temporary.replace(path)
    return torch.load(path, weights_only=True)


def warm_start(preset: Preset, drawings: Drawings, teacher: Path, path: Path) -> None:
    """Regress the student on the teacher's pairs (once): it learns to do in one pass what DDIM does in many."""
    if not path.exists():
        pipeline = load_teacher(teacher)
        pairs = make_pairs(preset, drawings, pipeline, path.with_name("pairs.pt"))
        components = replace(load_components(teacher), name="emoji", license=LICENCE)
        timesteps = ddim_timesteps(components.scheduler_config, preset.student_steps)
        student = Student(components, timesteps[0], {len(timesteps): timesteps}, base_model="emoji teacher")
        model = student.tiue().to(loop.device())
        components.text_encoder.to(loop.device()).requires_grad_(False)

        def loss(generator: torch.Generator) -> Tensor:
            rows = torch.randint(preset.pairs, (preset.regression_batch,), generator=generator)
            with torch.no_grad():
                text = encode_text(components, [pairs["captions"][row] for row in rows])
            return F.mse_loss(model(pairs["noise"][rows].to(text.device), text), pairs["latents"][rows].to(text.device))

        loop.train(
            model,
            loss,
            steps=preset.regression_steps,
            lr=preset.regression_lr,
            seed=preset.seed + 1,
            out=path.with_suffix(""),
            ema_decay=0.99,
        )
        warm = {
            "warm start": f"{preset.pairs} teacher pairs, {preset.pair_steps} DDIM steps, guidance {preset.guidance}"
        }
        student.provenance["history"] = [warm | {"steps": preset.regression_steps, "batch": preset.regression_batch}]
        save_student(path, student)


def distil(preset: Preset, drawings: Drawings, teacher: Path, initial: Path, out: Path) -> None:
    """VSD + KL from the warm start (once)."""
    if not (out / "student.safetensors").exists():
        run = Distillation(
            load_components(teacher),
            all_captions(drawings),
            out,
            preset.distil
            if loop.computes_in_bf16(loop.device().type)
            else replace(preset.distil, mixed_precision="no"),
            initial=load_student(initial),
            sample_prompts=draw_captions(drawings, 32, preset.seed + 1),
        )
        run.run()


def bundle(student: Path, out: Path) -> None:
    """What is shipped (once): `<out>/student.safetensors` in float16, and the bundle made from it, `<out>/bundle`."""
    if not (out / "bundle").exists():
        save_student(out / "student.safetensors", load_student(student), torch.float16)
        flags = ["--weights", "fp16", "--text-encoder", "int8", "--out", str(out / "bundle")]
        if status := export(["--ckpt", str(out / "student.safetensors"), *flags]):
            raise RuntimeError(f"the export ended with status {status}")
        made = Bundle.load(out / "bundle")
        write_bundle(made.directory, replace(made.manifest, prompts=Prompts(EXAMPLES, tuple(concept_list()))))


@torch.no_grad()
def _encode(pipeline: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    return pipeline.encode_prompt(texts, pipeline.device, 1, False)[0]
