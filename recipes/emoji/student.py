"""The student: a warm start on pairs that the teacher samples, then VSD and KL as in `python -m tiue`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tiue_runtime.bundle import Bundle, Prompts, write_bundle
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from export.onnx import main as export
from recipes.emoji.data import Drawings, spoken_names
from recipes.emoji.presets import Preset
from recipes.emoji.stage import SCORES, autocast, device, minimize, precision, spaced
from recipes.emoji.teacher import STYLE_PROBABILITY, load_teacher
from tiue.checkpoint import Student, load_student, save_student
from tiue.components import load_components
from tiue.distill.loop import train
from tiue.distill.vsd import Vsd, prepare
from tiue.files import one_line, written_whole
from tiue.text_encoder import encode_text

# Writes the student of the best checkpoint of a distillation in the place of the last one.
Choose = Callable[[Path, Vsd], None]

EXAMPLES = ("a red heart", "a rocket", "cat face", "pizza, noto style", "a rainbow", "sunflower, fluent style")
# The styles of seeds 0, 1, 2 and so on, for prompts that name none. Neighbors differ.
SEED_STYLES = ("noto", "fluent flat", "twemoji", "emojione", "fluent", "noto classic")
LICENSE = "Apache-2.0 AND MIT AND CC-BY-4.0"  # of the drawings


def all_captions(drawings: Drawings) -> list[str]:
    """List all captions of training drawings, with and without style words."""
    texts: dict[str, None] = {}
    for row in np.flatnonzero(~drawings.held_out):
        for variant in range(len(drawings.captions[drawings.concept[row]])):
            texts[drawings.caption(row, variant, False)] = None
            texts[drawings.caption(row, variant, True)] = None
    return list(texts)


def random_captions(drawings: Drawings, count: int, seed: int) -> list[str]:
    """Choose captions of random training drawings. They have style words as often as the teacher's did."""
    random = np.random.default_rng(seed)
    return [
        drawings.caption(
            row,
            random.integers(len(drawings.captions[drawings.concept[row]])),
            random.random() < STYLE_PROBABILITY,
        )
        for row in random.choice(np.flatnonzero(~drawings.held_out), count)
    ]


@torch.no_grad()
def sample_teacher(
    pipeline: StableDiffusionPipeline, text: Tensor, null: Tensor, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Turn noise (n, C, h, w) into the teacher's scaled latents, by `steps` DDIM steps with guidance."""
    with autocast():
        return pipeline(
            prompt_embeds=text.to(device()),
            negative_prompt_embeds=null.expand_as(text).to(device()),
            latents=noise.to(device()),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images.float()


def make_pairs(preset: Preset, drawings: Drawings, pipeline: StableDiffusionPipeline, path: Path) -> dict:
    """Sample (once) pairs of noise and the teacher's latents: {"captions", "noise", "latents"}.

    Raises:
        ValueError: the file has pairs of other captions, for example of other drawings, or is damaged.
    """
    captions = random_captions(drawings, preset.pairs, preset.seed)
    if not path.exists():
        generator = torch.Generator().manual_seed(preset.seed)
        size = pipeline.unet.config.sample_size
        noise = torch.randn(preset.pairs, preset.latent_channels, size, size, generator=generator)
        latents = []
        null = _encode(pipeline, [""])
        for start in tqdm(range(0, preset.pairs, preset.pair_batch), desc="pairs", mininterval=5):
            part = slice(start, start + preset.pair_batch)
            text = _encode(pipeline, captions[part])
            latents.append(sample_teacher(pipeline, text, null, noise[part], preset.pair_steps, preset.guidance).cpu())
        with written_whole(path) as temporary:
            torch.save({"captions": captions, "noise": noise, "latents": torch.cat(latents)}, temporary)
    found = load_pairs(path)
    if found["captions"] != captions:
        raise ValueError(f"{path} has pairs of other captions: delete it, and they are sampled again")
    return found


def load_pairs(path: Path) -> dict:
    """Load the pairs that `make_pairs` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        counts = {name: len(found[name]) for name in ("captions", "noise", "latents")}
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, UnpicklingError) as error:
        raise ValueError(f"{path}: expected the teacher's pairs of noise and latents: {one_line(error)}") from error
    if len(set(counts.values())) > 1:
        raise ValueError(f"{path}: expected as many captions as noise and latents, got {counts}")
    return found


def warm_start(preset: Preset, drawings: Drawings, teacher: Path, path: Path) -> None:
    """Train the student on the teacher's pairs by regression (once). One pass learns the work of many DDIM steps."""
    if not path.exists():
        pipeline = load_teacher(teacher)
        pairs = make_pairs(preset, drawings, pipeline, path.with_name("pairs.pt"))
        components = replace(load_components(teacher), name="emoji", license=LICENSE)
        process, counts = components.noise_schedule, preset.distill.steps
        timesteps = {steps: process.timesteps(steps) for steps in counts}
        student = Student(components, timesteps[max(counts)][0], timesteps, base_model="emoji teacher")
        model = student.tiue().to(device())
        schedules = [process.closed_form(timesteps[steps]) for steps in counts]
        components.text_encoder.to(device()).requires_grad_(False)
        noise, latents = (pairs[name].to(device()) for name in ("noise", "latents"))

        def loss(generator: torch.Generator, count: int) -> Tensor:
            rows = torch.randint(len(noise), (count,), generator=generator)
            with torch.no_grad():
                text = encode_text(components, [pairs["captions"][row] for row in rows])
            schedule = schedules[int(torch.randint(len(schedules), (), generator=generator))]
            rows = rows.to(device())
            return F.mse_loss(model(noise[rows], text, schedule), latents[rows])

        minimize(
            model,
            loss,
            path.parent / "runs/warm-start",
            iterations=preset.regression_steps,
            batch_size=preset.regression_batch,
            learning_rate=preset.regression_lr,
            ema_decay=0.99,
            seed=preset.seed + 1,
        )
        warm = {
            "warm start": f"{preset.pairs} teacher pairs, {preset.pair_steps} DDIM steps, guidance {preset.guidance}"
        }
        student.provenance["history"] = [warm | {"steps": preset.regression_steps, "batch": preset.regression_batch}]
        save_student(path, student)


def distill(preset: Preset, drawings: Drawings, teacher: Path, initial: Path, out: Path, choose: Choose) -> None:
    """Distill with VSD and KL from the warm start (once), and keep the best checkpoint."""
    if not (out / SCORES).exists():
        run, method = prepare(
            load_components(teacher),
            all_captions(drawings),
            out,
            replace(preset.distill, mixed_precision=precision(), **spaced(preset.distill.iterations)),
            initial=load_student(initial),
            sample_prompts=random_captions(drawings, 32, preset.seed + 1),
        )
        train(run, method)
        choose(out, method)


def vocabulary(drawings: Drawings) -> tuple[str, ...]:
    """List what the model was taught to draw: the label of every concept, then what people call it."""
    spoken, labels = spoken_names(), [captions[0] for captions in drawings.captions]
    return tuple(dict.fromkeys([*labels, *(name for label in labels for name in spoken.get(label, []))]))


def bundle(drawings: Drawings, student: Path, out: Path) -> None:
    """Make the shipped files (once): `<out>/student.safetensors` in float16, and its bundle `<out>/bundle`.

    Raises:
        ValueError: the export failed. It has printed why.
    """
    if not (out / "bundle").exists():
        save_student(out / "student.safetensors", load_student(student), torch.float16)
        flags = ["--weights", "fp16", "--text-encoder", "int8", "--out", str(out / "bundle")]
        if status := export(["--ckpt", str(out / "student.safetensors"), *flags]):
            raise ValueError(f"the export ended with status {status}")
    made, prompts = Bundle.load(out / "bundle"), Prompts(EXAMPLES, vocabulary(drawings), SEED_STYLES)
    if made.manifest.prompts != prompts:  # It may have been stopped here.
        write_bundle(made.directory, replace(made.manifest, prompts=prompts))


@torch.no_grad()
def _encode(pipeline: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    return pipeline.encode_prompt(texts, pipeline.device, 1, False)[0]
