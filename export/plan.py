"""The plan of an export: its targets, the files of its bundle, and the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

from diffusers import AutoencoderKL, AutoencoderTiny
from PIL.Image import Resampling
from tiue_runtime import bundle

from export.errors import ExportError
from export.export_options import Options
from export.source import check_tiny_vae
from export.triton import repository_file
from export.upscaler import LoadedUpscaler
from export.writer import EXTERNAL_ABOVE
from tiue.checkpoint import Student
from tiue.safety_checker import SafetyChecker


@dataclass(frozen=True)
class Plan:
    """The decisions that follow from the student and the options."""

    student: Student
    options: Options
    targets: tuple[str, ...]  # variants of the bundle, never empty
    manifest: bundle.Manifest  # without preview, files and memory of runs, which later stages add
    vaes: Mapping[str, AutoencoderKL | AutoencoderTiny]  # by the name of the graph, the default first

    @property
    def safety_checker(self) -> SafetyChecker | None:
        """The model's safety checker, if the bundle gets one."""
        return self.student.components.safety_checker if self.options.safety_checker else None


def make_plan(student: Student, options: Options) -> Plan:
    """Plan an export.

    Args:
        student: the model to export.
        options: if `target` or `vae` is empty, the default takes its place.

    Raises:
        ExportError: the options do not fit the student.
    """
    targets = options.variants or ((bundle.PORTABLE,) if options.triton else default_targets(student))
    if options.tiny_vae is not None:
        check_tiny_vae(options.tiny_vae, student.components)
    _check_upscaler(options.upscaler, student.components.geometry.multiple)
    if options.triton and options.safety_checker and student.components.safety_checker is not None:
        raise ExportError(
            "`target` triton: its model cannot check pictures, and `safety_checker` is on; turn it off to export the "
            "model without"
        )
    kinds = _vae_kinds(student, options)
    own, tiny = student.components.vae, options.tiny_vae
    vaes = {
        name: tiny if kind == bundle.TINY and tiny is not None else own
        for kind, name in bundle.vae_graphs(kinds).items()
    }
    return Plan(student, options, targets, _manifest(student, options, targets, kinds), vaes)


def default_targets(student: Student) -> tuple[str, ...]:
    """Return the targets of an export whose options name none.

    A large model also gets graphs for the CPU, where the portable graphs take much more memory.
    """
    size = sum(p.numel() * p.element_size() for p in student.components.unet.parameters())
    return (bundle.PORTABLE, bundle.CPU) if size > EXTERNAL_ABOVE else (bundle.PORTABLE,)


def latent_sizes(manifest: bundle.Manifest) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (h, w) of the default size and of about half of it, in latent pixels."""
    multiple = manifest.size_multiple // manifest.pixels_per_latent
    height = manifest.default_height // manifest.pixels_per_latent
    width = manifest.default_width // manifest.pixels_per_latent
    half_height, half_width = (max(side // multiple // 2, 1) * multiple for side in (height, width))
    return (height, width), (half_height, half_width)


def _check_upscaler(upscaler: LoadedUpscaler | None, multiple: int) -> None:
    if upscaler is not None and multiple % upscaler.multiple:
        raise ExportError(
            f"`upscaler`: it takes sides that are multiples of {upscaler.multiple}, but the model's pictures have "
            f"multiples of {multiple}"
        )


def _vae_kinds(student: Student, options: Options) -> tuple[str, ...]:
    """Return the kinds of image decoders, the default first."""
    own = bundle.TINY if isinstance(student.components.vae, AutoencoderTiny) else bundle.KL
    if own == bundle.TINY and options.vae:
        raise ExportError("`vae`: the model's own VAE is tiny already")
    return options.vae or (own,)


def _variants(
    targets: Iterable[str], vae_kinds: Iterable[str], *, optional: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Return the file of every graph of every target.

    All targets share the text encoder, the safety checker and the upscaler, in standard operators.
    """
    variants: dict[str, dict[str, str]] = {}
    for target in targets:
        suffix = "" if target == bundle.PORTABLE else f".{target}"
        names = (bundle.UNET_ENCODER, bundle.UNET_DECODER, *bundle.vae_graphs(vae_kinds).values())
        variants[target] = {name: f"{name}{suffix}.onnx" for name in names}
        variants[target][bundle.TEXT_ENCODER] = bundle.GRAPH_FILES[bundle.TEXT_ENCODER]
        variants[target] |= {name: f"{name}.onnx" for name in optional}
    return variants


def _manifest(
    student: Student, options: Options, targets: tuple[str, ...], vae_kinds: tuple[str, ...]
) -> bundle.Manifest:
    components = student.components
    geometry = components.geometry
    checker, upscaler = (components.safety_checker if options.safety_checker else None), options.upscaler
    optional = [name for name, it in ((bundle.SAFETY_CHECKER, checker), (bundle.UPSCALER, upscaler)) if it is not None]
    schedules: dict[int, bundle.Schedule] = {}
    for steps in sorted(student.schedules):
        s = student.schedule(steps)
        schedules[steps] = bundle.Schedule(s.timesteps, s.noise_weight, s.step_weights)
    decoder_timesteps = {t for s in schedules.values() for t in s.timesteps}
    name = options.name or components.name
    variants = _variants(targets, vae_kinds, optional=optional)
    if options.triton:
        ((target, graphs),) = variants.items()
        variants = {target: {graph: repository_file(name, graph) for graph in graphs}}
    return bundle.Manifest(
        name=name,
        license=components.license,
        created_from={
            "base_model": student.base_model,
            "tiue": version("tiue"),
            "text_encoder": options.stored_text_encoder,
            **({} if options.safety_checker else {"safety_checker": "left out on request"}),
            **({} if upscaler is None else {"upscaler": upscaler.origin}),
            **{f"lora_{i}": lora for i, lora in enumerate(student.loras, start=1)},
            **({"scheduler": f"one step of {student.one_step.scheduler}"} if student.one_step else {}),
        },
        precision=options.precision,
        weights="int8" if options.precision == "int8" else options.stored,
        latent_channels=geometry.channels,
        pixels_per_latent=geometry.pixels_per_latent,
        default_height=geometry.height * geometry.pixels_per_latent,
        default_width=geometry.width * geometry.pixels_per_latent,
        size_multiple=geometry.multiple,
        text_length=components.tokenizer.model_max_length,
        encoder_timestep=student.encoder_timestep,
        decoder_timesteps=tuple(sorted(decoder_timesteps, reverse=True)),
        schedules=schedules,
        default_steps=max(schedules),
        variants=variants,
        vaes=vae_kinds,
        sizes=options.further_sizes,
        safety_checker=None if checker is None else _preparation(checker),
        upscaler=None if upscaler is None else bundle.Upscaler(upscaler.scale),
    )


def _preparation(checker: SafetyChecker) -> bundle.SafetyChecker:
    """Say how the safety checker gets its pictures. Scorer does the rest of the feature extractor's work."""
    processor = checker.processor
    name = Resampling(processor.resample).name.lower()
    return bundle.SafetyChecker(processor.size["shortest_edge"], processor.crop_size["height"], name)
