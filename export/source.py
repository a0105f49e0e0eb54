"""What there is to export: a student checkpoint, a diffusers pipeline, or a UNet's weights with one for the rest."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffusers import AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]
from safetensors import SafetensorError, safe_open

from export.errors import ExportError
from tiue.checkpoint import Student, load_student
from tiue.components import Components, load_components
from tiue.hub import is_hub_id
from tiue.unet import check_shared_up_blocks

DEFAULT_STEPS = 4  # of a pipeline directory, which does not say what it was trained for


def load_source(
    path_or_id: str | Path,
    steps: Sequence[int] | None = None,
    base: str | Path | None = None,
    shared_up_blocks: int | None = None,
) -> Student:
    """Load what there is to export and settle the schedules.

    Args:
        path_or_id: a student.safetensors; a diffusers pipeline directory; with `base`, a safetensors file of UNet
            weights; or, where there is no such path, the Hugging Face Hub id (owner/name) of a pipeline to download.
        steps: the step counts wanted. Of a student's schedules all by default; of a pipeline, DDIM's with 4
            steps. A pipeline's encoder runs at the first timestep of the longest.
        shared_up_blocks: of what is no student and does not say, 0 by default.
        base: the pipeline directory, or Hub id, that has the rest of a UNet's model, and its configuration.

    Raises ValueError (CheckpointError, ComponentsError, ExportError), in one line.
    """
    source = Path(path_or_id)
    if not source.is_file():
        if base is not None:
            what = "is a pipeline" if source.is_dir() else "is no such file"
            raise ExportError(f"--base goes with a file of UNet weights, but {path_or_id} {what}")
        if not source.is_dir() and not is_hub_id(str(path_or_id)):
            raise ExportError(f"no such checkpoint: {path_or_id} (no such file or directory)")
        components = load_components(path_or_id, local_files_only=False)
        student = _undeclared(components, steps, components.name, shared_up_blocks)
    elif base is not None:
        if _is_student(source):
            raise ExportError(f"--base goes with a file of UNet weights, but {source} is a student, which has its own")
        components = load_components(base, local_files_only=False, unet_file=source)
        student = _undeclared(components, steps, Path(base).resolve().name, shared_up_blocks)
    elif _is_student(source):
        student = _declared(load_student(source), steps, source, shared_up_blocks)
    else:
        raise ExportError(f"{source} is not a TiUE student; if it is a UNet's weights, --base DIR must give the rest")
    _check_fit(student.components)
    return student


def _is_student(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "tiue_student" in (file.metadata() or {})
    except SafetensorError as error:
        raise ExportError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def _undeclared(
    components: Components, steps: Sequence[int] | None, base_model: str, shared_up_blocks: int | None
) -> Student:
    """A student that does not say what it was trained for: DDIM's timesteps are taken for it."""
    schedules = {n: components.noise_schedule.timesteps(n) for n in steps or [DEFAULT_STEPS]}
    check_shared_up_blocks(components.unet, shared_up_blocks or 0)
    return Student(
        components,
        encoder_timestep=schedules[max(schedules)][0],
        schedules=schedules,
        base_model=base_model,
        shared_up_blocks=shared_up_blocks or 0,
        declared=False,
    )


def _declared(student: Student, steps: Sequence[int] | None, path: Path, shared_up_blocks: int | None) -> Student:
    """A student with those of its schedules that are wanted."""
    if shared_up_blocks not in (None, student.shared_up_blocks):
        raise ExportError(
            f"--shared-up-blocks {shared_up_blocks}: {path} was trained with {student.shared_up_blocks} shared"
        )
    unknown = sorted(set(steps or ()) - set(student.schedules))
    if unknown:
        known = ", ".join(map(str, sorted(student.schedules)))
        raise ExportError(f"--steps {unknown[0]}: {path} was trained for {known} steps")
    return replace(student, schedules={n: student.schedules[n] for n in steps or student.schedules})


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
    _ = components.geometry  # refused here where the UNet has no default size


def check_tiny_vae(tiny: AutoencoderTiny, components: Components) -> None:
    """Raise ExportError unless a tiny VAE is made for the model's latents."""
    own, other = components.vae.config, tiny.config
    for what, theirs, ours in (
        ("latent channels", other["latent_channels"], own["latent_channels"]),
        ("levels", len(other["decoder_block_out_channels"]), len(own["block_out_channels"])),
    ):
        if theirs != ours:
            raise ExportError(f"--vae-path: it has {theirs} {what}, the model's VAE {ours}")
