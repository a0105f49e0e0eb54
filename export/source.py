"""Reading the model: a student, a diffusers pipeline, or a file of weights with a pipeline for the rest."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from diffusers import AutoencoderTiny
from safetensors import safe_open

from export.errors import ExportError
from export.lora import Lora, merge_lora
from tiue.checkpoint import Student, load_student
from tiue.components import Components, ComponentsError, check_fit, load_components, load_safety_checker
from tiue.files import is_directory, is_file
from tiue.fold import fold_guidance, fold_input_scale
from tiue.hub import is_hub_id
from tiue.one_step import OneStep, SchedulerChoice, check_several_steps, one_step
from tiue.pipeline_directory import WITH_WEIGHTS
from tiue.plausible import check_runs
from tiue.recognize import is_original_layout, is_single_file, kind_of_weights
from tiue.unet import check_shared_up_blocks
from tiue.weights import WeightsError, read_headers

DEFAULT_STEPS = 4  # of a pipeline directory, which declares no training
_LITTLE_NOISE = 0.9  # abar, the share of the picture in a model's input


def load_source(
    path_or_id: str | Path,
    steps: Sequence[int] | None = None,
    base: str | Path | None = None,
    shared_up_blocks: int | None = None,
    loras: Sequence[Lora] = (),
    choice: SchedulerChoice | None = None,
    safety_checker: bool | str = True,
) -> Student:
    """Load the model to export, and choose its schedules.

    Args:
        path_or_id: a student.safetensors, or a diffusers pipeline directory. With `base`, a safetensors file of UNet
            weights, or a single file in the original layout (A1111's). Where there is no such path, the Hugging Face
            Hub id (owner/name) of a pipeline to download.
        steps: the wanted step counts. By default, a student keeps all its schedules, and a pipeline gets DDIM's
            schedule of 4 steps. A pipeline's encoder runs at the first timestep of its longest schedule. A pipeline
            with 1 step alone is a one-step student of any method, and makes the step of its own scheduler.
        base: the pipeline directory, or Hub id, that has the rest of a UNet's model, and its configuration.
        shared_up_blocks: number of up blocks that run once, of a model that does not declare it. 0 by default.
        loras: to merge into the model, in this order. Pickles are refused.
        choice: how a one-step student of another method makes its step, where its pipeline does not say so.
        safety_checker: whether to load that of the pipeline or of base, if there is one. Or the pipeline, or Hub id, to
            take it from.

    Raises:
        ValueError: (CheckpointError, ComponentsError, ExportError) in one line.
    """
    source = Path(path_or_id)
    if is_file(source):
        student = _load_file(source, steps, base, shared_up_blocks, choice, safety_checker is True)
    else:
        if base is not None:
            found = "is a pipeline" if is_directory(source) else "is no such file"
            raise ExportError(f"`base` goes with a file of UNet weights, but {path_or_id} {found}")
        if not is_directory(source) and not is_hub_id(str(path_or_id)):
            raise ExportError(f"no such checkpoint: {path_or_id} (no such file or directory)")
        components = load_components(
            path_or_id,
            local_files_only=False,
            guided=_is_guided(choice),
            safety_checker=safety_checker is True,
        )
        student = _undeclared(components, steps, components.name, shared_up_blocks, choice)
    if isinstance(safety_checker, str):
        checker = load_safety_checker(safety_checker, local_files_only=False)
        student = replace(student, components=replace(student.components, safety_checker=checker))
    if loras:
        student = replace(student, loras=tuple(str(merge_lora(student.components, lora)) for lora in loras))
    _fold(student, choice)
    _check_finite(path_or_id, student.components)
    try:
        check_fit(student.components)
        check_runs(student.components, replace(student, share_encoder=True).tiue())
    except ComponentsError as error:
        raise ExportError(f"{path_or_id}: {error}") from error
    return student


def _check_finite(path_or_id: str | Path, components: Components) -> None:
    """Raise ExportError for a weight of which nothing can be computed. Merged models sometimes have such weights."""
    modules = {part: getattr(components, part) for part in WITH_WEIGHTS}
    if components.safety_checker:
        modules["safety_checker"] = components.safety_checker.module
    for part, module in modules.items():
        for name, tensor in module.state_dict().items():
            if not tensor.isfinite().all():
                raise ExportError(f"{path_or_id}: {part}.{name} holds infinity or NaN: the weights are damaged")


def _load_file(
    source: Path,
    steps: Sequence[int] | None,
    base: str | Path | None,
    shared_up_blocks: int | None,
    choice: SchedulerChoice | None,
    safety_checker: bool,
) -> Student:
    try:
        names = read_headers(source)
    except WeightsError as error:
        raise ExportError(f"{source} {error}") from error
    with safe_open(source, "pt") as file:
        is_student = "tiue_student" in (file.metadata() or {})
    if is_student:
        if base is not None:
            raise ExportError(f"`base` goes with a file of UNet weights, but {source} is a student, which has its own")
        if choice is not None:
            options = "`timesteps`, `scheduler` and `guidance`"
            raise ExportError(f"{options} are for students of other methods, but {source} is a TiUE student")
        return _with_own_schedules(load_student(source), steps, source, shared_up_blocks)
    if kind := kind_of_weights(names):
        raise ExportError(f"{source} {kind}")
    if base is None:
        raise ExportError(_without_base(source, names))
    components = load_components(
        base,
        local_files_only=False,
        unet_file=source,
        guided=_is_guided(choice),
        safety_checker=safety_checker,
    )
    return _undeclared(components, steps, Path(base).resolve().name, shared_up_blocks, choice)


def _without_base(source: Path, names: Collection[str]) -> str:
    if is_original_layout(names):
        layout = "a single file in the original layout (A1111's)" if is_single_file(names) else "a UNet in that layout"
        return (
            f"{source} is {layout}, which has no configurations: `base` must name a diffusers pipeline directory of "
            "the same family for them"
        )
    return f"{source} is not a TiUE student; if it is a UNet's weights, `base` must name a pipeline with the rest"


def _undeclared(
    components: Components,
    steps: Sequence[int] | None,
    base_model: str,
    shared_up_blocks: int | None,
    choice: SchedulerChoice | None,
) -> Student:
    """Make a student of a model that declares no training. One of several steps has DDIM's timesteps."""
    check_shared_up_blocks(components.unet, shared_up_blocks or 0)
    made = Student(
        components,
        encoder_timestep=0,
        schedules={},
        base_model=base_model,
        shared_up_blocks=shared_up_blocks or 0,
        declared=False,
    )
    wanted = sorted(set(steps or ([DEFAULT_STEPS] if choice is None else [1])))
    if choice is not None and wanted != [1]:
        found = ",".join(map(str, wanted))
        raise ExportError(f"`timesteps`, `scheduler` and `guidance` go with `steps` 1, got {found}")
    try:
        if wanted == [1]:
            step = one_step(components.scheduler_config, choice)
            timesteps = list(step.schedule.timesteps)
            _warn_of_little_noise(components, step)
            return replace(made, encoder_timestep=timesteps[0], schedules={1: timesteps}, one_step=step)
        check_several_steps(components.scheduler_config)
    except ValueError as error:
        raise ExportError(f"{components.name}: {error}") from error
    schedules = {n: components.noise_schedule.timesteps(n) for n in wanted}
    return replace(made, encoder_timestep=schedules[max(schedules)][0], schedules=schedules)


def _warn_of_little_noise(components: Components, step: OneStep) -> None:
    if step.abar > _LITTLE_NOISE:
        warnings.warn(
            f"{components.name}: {step.scheduler} makes its one step at timestep {step.schedule.timesteps[0]}, where "
            "there is almost no noise to remove. Most one-step students were trained at the last timestep: "
            f"`timesteps` {len(components.noise_schedule.abar) - 1}",
            stacklevel=5,
        )


def _is_guided(choice: SchedulerChoice | None) -> bool:
    return choice is not None and choice.guidance is not None


def _fold(student: Student, choice: SchedulerChoice | None) -> None:
    """Fold the constants of a one-step student into its UNet."""
    unet = student.components.unet
    if student.one_step is not None:
        fold_input_scale(unet, student.one_step.input_scale)
    if choice is not None and choice.guidance is not None:
        try:
            fold_guidance(unet, choice.guidance)
        except ValueError as error:
            raise ExportError(f"{student.components.name}: {error}") from error


def _with_own_schedules(
    student: Student, steps: Sequence[int] | None, path: Path, shared_up_blocks: int | None
) -> Student:
    """Keep the wanted schedules of a student. It must have been trained for them."""
    if shared_up_blocks not in (None, student.shared_up_blocks):
        raise ExportError(
            f"`shared_up_blocks` {shared_up_blocks}: {path} was trained with {student.shared_up_blocks} shared"
        )
    unknown = sorted(set(steps or ()) - set(student.schedules))
    if unknown:
        known = ", ".join(map(str, sorted(student.schedules)))
        raise ExportError(f"`steps` {unknown[0]}: {path} was trained for {known} steps")
    return replace(student, schedules={n: student.schedules[n] for n in steps or student.schedules})


def check_tiny_vae(tiny: AutoencoderTiny, components: Components) -> None:
    """Raise ExportError unless a tiny VAE is made for the model's latents."""
    own, other = components.vae.config, tiny.config
    for quantity, theirs, ours in (
        ("latent channels", other["latent_channels"], own["latent_channels"]),
        ("levels", len(other["decoder_block_out_channels"]), len(own["block_out_channels"])),
    ):
        if theirs != ours:
            raise ExportError(f"the tiny VAE has {theirs} {quantity}, the model's VAE {ours}")
