"""What there is to export: a student checkpoint, or a diffusers pipeline directory."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from collections.abc import Sequence
from pathlib import Path

from tiue.checkpoint import Student, load_student
from tiue.components import Components, load_components
from tiue.schedule import ddim_timesteps

from .errors import ExportError

DEFAULT_STEPS = 4  # of a pipeline directory, which does not say what it was trained for


def load_source(path: Path, steps: Sequence[int] | None = None) -> Student:
    """Load `path` and settle the schedules to export.

    Args:
        path: a student.safetensors, or a diffusers pipeline directory.
        steps: the step counts wanted. Of a student's schedules all by default; of a pipeline, DDIM's with 4
            steps. A pipeline's encoder runs at the first timestep of the longest.

    Raises ValueError (CheckpointError, ComponentsError, ExportError), in one line.
    """
    if path.is_dir():
        components = load_components(path)
        wanted = steps or [DEFAULT_STEPS]
        schedules = {n: ddim_timesteps(components.scheduler_config, n) for n in wanted}
        encoder_timestep = schedules[max(schedules)][0]
        student = Student(components, encoder_timestep, schedules, base_model=components.name)
    else:
        student = load_student(path)
        unknown = sorted(set(steps or ()) - set(student.schedules))
        if unknown:
            known = ", ".join(map(str, sorted(student.schedules)))
            raise ExportError(f"--steps {unknown[0]}: {path} was trained for {known} steps")
        schedules = {n: student.schedules[n] for n in steps or student.schedules}
        student = Student(
            student.components, student.encoder_timestep, schedules, student.base_model, student.provenance
        )
    _check_fit(student.components)
    return student


def _check_fit(components: Components) -> None:
    """Raise ExportError where the parts do not belong together, or a bundle cannot say what they need."""
    unet, vae, text = components.unet.config, components.vae.config, components.text_encoder.config
    channels, latent_channels = unet["in_channels"], vae["latent_channels"]
    if channels != latent_channels:
        raise ExportError(f"the UNet has {channels} latent channels but the VAE {latent_channels}")
    if unet["cross_attention_dim"] != text.hidden_size:
        raise ExportError(
            f"the UNet expects text embeddings of {unet['cross_attention_dim']} but the text encoder "
            f"makes {text.hidden_size}"
        )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise ExportError("a VAE with latents_mean or latents_std is not supported")
    length, limit = components.tokenizer.model_max_length, text.max_position_embeddings
    if length > limit:
        raise ExportError(f"the tokenizer's model_max_length is {length}, the text encoder takes at most {limit}")
    if unet["sample_size"] is None:
        raise ExportError("the UNet's configuration has no sample_size, so there is no default image size")
