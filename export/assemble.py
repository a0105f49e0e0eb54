"""Assembling a bundle: built in a temporary directory, checked, and only then moved into place."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from diffusers import AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]
from tiue_runtime import bundle
from tokenizers import Tokenizer

from export.calibrate import PROMPTS, Calibration
from export.card import model_card
from export.errors import ExportError
from export.fit_preview import fit_preview
from export.graphs import Form, forget_graphs, unet_graphs, vae_decoder_graph
from export.parity import INT8_FLOOR_DB, PSNR_FLOOR_DB, Checker, Row, judge
from export.source import check_tiny_vae
from export.storage import store_float16, store_int8
from export.text_encoder import text_encoder_graph
from export.working_memory import give_back
from export.writer import EXTERNAL_ABOVE, GraphWriter
from tiue.checkpoint import Student
from tiue.components import Components


@dataclass(frozen=True)
class Options:
    """What a bundle may differ in. Raises ExportError for what contradicts itself."""

    name: str | None = None  # the model's by default
    targets: tuple[str, ...] = ()  # of bundle.VARIANTS; by default portable, and cpu where weights have their own file
    # What the graphs compute in: fp32; fp16 with the parts that overflow in fp32; int8 with what loses most in fp32.
    precision: str = "fp32"
    weights: str | None = None  # how the files store them, fp32 or fp16; as the graphs compute by default
    text_encoder: str = "fp32"  # or int8, which is storage, too
    tiny_vae: AutoencoderTiny | None = None  # a decoder that comes with the model's own, or takes its place
    vaes: tuple[str, ...] = ()  # of bundle.VAE_KINDS, the default first; the model's own by default
    calibration_prompts: tuple[str, ...] = PROMPTS  # what int8 measures the ranges of activations on
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.precision == "fp16" and self.weights == "fp32":
            raise ExportError("--weights fp32: what computes in fp16 has fp16 weights; leave it out")
        if self.precision == "fp16" and self.targets == (bundle.CPU,):
            raise ExportError("--precision fp16: the cpu target computes in fp32; --weights fp16 halves its files")
        if self.precision == "int8" and bundle.CUDA in self.targets:
            raise ExportError("--precision int8: CUDA has no such kernels; export the cuda target in fp16")
        if ("tiny" in self.vaes) != (self.tiny_vae is not None):
            raise ExportError(
                "--vae tiny and --vae-path, the directory of a diffusers AutoencoderTiny, need each other"
            )

    @property
    def stored(self) -> str:
        """How the files store weights."""
        return self.weights or ("fp32" if self.precision == "int8" else self.precision)

    @property
    def stored_text_encoder(self) -> str:
        """How the file of the text encoder stores weights."""
        return self.stored if self.text_encoder == "fp32" else self.text_encoder

    @property
    def floor_db(self) -> float | None:
        """The PSNR that latents and pictures must reach; None where they must match PyTorch to float32 rounding."""
        if self.precision == "int8":
            return INT8_FLOOR_DB
        return None if (self.precision, self.stored, self.text_encoder) == ("fp32",) * 3 else PSNR_FLOOR_DB


def check_target(out: Path, overwrite: bool) -> None:
    """Raise ExportError unless `out` is free, an empty directory, or a bundle that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ExportError(f"--out {out} exists; choose another, or replace it with --overwrite")
    if not (out / bundle.MANIFEST).is_file():
        raise ExportError(f"--out {out} exists and is not a bundle, so --overwrite does not replace it")


def export_bundle(
    student: Student,
    out: Path,
    options: Options,
    progress: Callable[[str], None],
    report: Callable[[list[Row]], None],
) -> bundle.Bundle:
    """Export `student` to the directory `out`.

    Args:
        progress: told each stage.
        report: given the parity table's rows before they are judged.

    Raises ExportError (ParityError if the graphs do not compute the same), OSError. Whatever happens,
    KeyboardInterrupt included, `out` is complete or as it was, and nothing else is left.
    """
    check_target(out, options.overwrite)
    options = replace(options, targets=options.targets or _default_targets(student))
    if options.tiny_vae is not None:
        check_tiny_vae(options.tiny_vae, student.components)
    out = out.resolve()  # what a link points to is replaced, not the link
    building = out.with_name(f".{out.name}.{os.getpid()}.tmp")  # the same file system, so that moving is renaming
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        building.mkdir(parents=True)
        manifest = _manifest(student, options)
        _write_graphs(building, student, manifest, options, progress)
        _write_tokenizer(building / bundle.TOKENIZER, student.components)
        vaes = dict(_image_decoders(student, options, manifest))
        manifest = replace(manifest, preview=fit_preview(student, manifest, vaes[bundle.VAE_DECODER], progress))
        progress("checking the graphs against PyTorch")
        checker = Checker(building, manifest, student, vaes, exact=options.floor_db is None)
        rows = checker.check()
        report(rows)
        judge(rows, options.floor_db)
        manifest = replace(manifest, memory=checker.memory)
        card = model_card(manifest, student.base_model, options.stored_text_encoder)
        (building / "README.md").write_text(card, encoding="utf-8")
        bundle.write_bundle(building, manifest)
        _move_into_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if not out.exists():
            for parent in missing:
                with suppress(OSError):  # never made, or no longer only ours
                    parent.rmdir()
    return bundle.Bundle.load(out)


def _write_graphs(
    directory: Path,
    student: Student,
    manifest: bundle.Manifest,
    options: Options,
    progress: Callable[[str], None],
) -> None:
    writer = GraphWriter(directory, share=len(options.targets) > 1)
    dtype = torch.float16 if options.precision == "fp16" else torch.float32

    def write(variant: str, name: str, graph: ir.Model) -> None:
        if options.stored == "fp16":
            store_float16(graph)
        writer.write(graph, manifest.variants[variant][name])

    progress("exporting the text encoder")
    int8 = options.text_encoder == "int8"
    text_encoder = text_encoder_graph(student.components, torch.float32 if int8 else dtype)  # int8 is of float32
    if int8:
        store_int8(text_encoder)
    write(options.targets[0], bundle.TEXT_ENCODER, text_encoder)
    del text_encoder
    for target in options.targets:
        # What is stored in fp16 the CPU computes in fp32 in any case.
        form = Form(target, torch.float32 if target == bundle.CPU else dtype)
        progress(f"exporting the UNet's encoder and decoder, {target}")
        graphs = list(unet_graphs(student.tiue(), manifest.decoder_timesteps, manifest.text_length, form))
        calibration = None
        if options.precision == "int8":
            calibration = Calibration(student, manifest, options.calibration_prompts, progress)
            calibration.unet(*graphs)
        write(target, bundle.UNET_DECODER, graphs.pop())
        write(target, bundle.UNET_ENCODER, graphs.pop())
        for name, vae in _image_decoders(student, options, manifest):
            progress(f"exporting {name}, {target}")
            graph = vae_decoder_graph(vae, form)
            if calibration:
                calibration.vae(graph)
            write(target, name, graph)
        forget_graphs()
        give_back()


def _default_targets(student: Student) -> tuple[str, ...]:
    size = sum(p.numel() * p.element_size() for p in student.components.unet.parameters())
    return (bundle.PORTABLE, bundle.CPU) if size > EXTERNAL_ABOVE else (bundle.PORTABLE,)


def _image_decoders(student: Student, options: Options, manifest: bundle.Manifest) -> Iterator[tuple[str, Any]]:
    """Yield the graph's name and the module of each VAE, the default first."""
    for kind, name in manifest.vae_graphs.items():
        tiny = kind == bundle.TINY and options.tiny_vae is not None
        yield name, options.tiny_vae if tiny else student.components.vae


def _variants(options: Options, vaes: Iterable[str]) -> dict[str, dict[str, str]]:
    """The file of each graph, for each target. Special operators would gain nothing in the text encoder."""
    variants: dict[str, dict[str, str]] = {}
    for target in options.targets:
        suffix = "" if target == bundle.PORTABLE else f".{target}"
        names = (bundle.UNET_ENCODER, bundle.UNET_DECODER, *bundle.vae_graphs(vaes).values())
        variants[target] = {name: f"{name}{suffix}.onnx" for name in names}
        variants[target][bundle.TEXT_ENCODER] = bundle.GRAPH_FILES[bundle.TEXT_ENCODER]
    return variants


def _vaes(student: Student, options: Options) -> tuple[str, ...]:
    """Return the kinds of VAEs, the default first."""
    own = bundle.TINY if isinstance(student.components.vae, AutoencoderTiny) else bundle.KL
    if own == bundle.TINY and options.vaes:
        raise ExportError("--vae: the model's own VAE is tiny already")
    return options.vaes or (own,)


def _manifest(student: Student, options: Options) -> bundle.Manifest:
    components = student.components
    geometry = components.geometry
    schedules: dict[int, bundle.Schedule] = {}
    for steps, timesteps in sorted(student.schedules.items()):
        s = components.noise_schedule.closed_form(timesteps)
        schedules[steps] = bundle.Schedule(s.timesteps, s.noise_weight, s.step_weights)
    vaes = _vaes(student, options)
    decoder_timesteps = {t for s in schedules.values() for t in s.timesteps}
    return bundle.Manifest(
        name=options.name or components.name,
        license=components.license,
        created_from={
            "base_model": student.base_model,
            "tiue": version("tiue"),
            "text_encoder": options.stored_text_encoder,
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
        variants=_variants(options, vaes),
        vaes=vaes,
    )


def _write_tokenizer(path: Path, components: Components) -> None:
    """Write tokenizer.json with padding and truncation to the text length, as the runtime expects it."""
    fast = components.tokenizer
    tokenizer = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    length = fast.model_max_length
    tokenizer.enable_truncation(length, direction=fast.truncation_side)
    tokenizer.enable_padding(
        length=length, pad_id=fast.pad_token_id, pad_token=fast.pad_token, direction=fast.padding_side
    )
    tokenizer.save(str(path))


def _move_into_place(building: Path, out: Path) -> None:
    """Rename; a bundle that is there steps aside first, and comes back if that fails."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        if out.exists():
            out.rename(aside)
        building.rename(out)
    finally:
        if aside.exists():
            if out.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(out)
